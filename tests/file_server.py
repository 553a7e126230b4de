"""The place where a data set is published, stood in for by a server on this machine."""

import hashlib
import http.server
import threading
from contextlib import contextmanager


@contextmanager
def serving(body: bytes):
    """A server of one file under every name; its attributes steer it: body, status. hits counts.

    url is its address, published what data.download wants of the file: bytes and sha256.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.hits += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.status, server.hits = body, 200, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.published = (len(body), hashlib.sha256(body).hexdigest())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
