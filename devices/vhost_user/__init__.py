"""The vhost-user protocol, backend side: messages into values, a session that folds them, a connection that carries them."""
