"""The vhost-user protocol, backend side: messages into values, a session folds them, a connection carries them."""
