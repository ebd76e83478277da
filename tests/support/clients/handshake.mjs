// Words: the server's name, its port here. Fails if it is not trusted, by NODE_EXTRA_CA_CERTS too.
import { connect } from "node:tls";

const [name, port] = process.argv.slice(2);
const socket = connect({ host: "127.0.0.1", port: Number(port), servername: name });
socket.on("secureConnect", () => socket.end());
socket.on("error", (error) => {
    console.error(error.message);
    process.exit(1);
});
