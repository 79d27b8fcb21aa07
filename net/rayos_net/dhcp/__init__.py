"""DHCP for guests: a codec, a server and a client without I/O, and thin trio shells around them."""
