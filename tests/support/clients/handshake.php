<?php
// Words: a file with the only authority, the server's name, its port here. Fails if not trusted.
[, $authority, $name, $port] = $argv;
$context = stream_context_create(["ssl" => ["cafile" => $authority, "peer_name" => $name]]);
$socket = stream_socket_client(
    "ssl://127.0.0.1:$port", $code, $reason, 60, STREAM_CLIENT_CONNECT, $context
);
exit($socket ? 0 : 1);
