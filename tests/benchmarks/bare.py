"""The measuring stick: a Tornado server that does the same exchange without storage, tokens or filters."""

from __future__ import annotations

import asyncio
import json
import sys

import tornado.httpserver
import tornado.netutil
import tornado.web


class Post(tornado.web.RequestHandler):
    def post(self) -> None:
        body = json.loads(self.request.body)
        waiters, self.application.settings["waiters"] = self.application.settings["waiters"], set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(body)
        self.set_status(202)
        self.write({"published": True, "subscriber_count": len(waiters)})


class Wait(tornado.web.RequestHandler):
    async def get(self) -> None:
        self.waiter: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.application.settings["waiters"].add(self.waiter)
        body = await self.waiter
        self.write({"events": [body]})

    def on_connection_close(self) -> None:
        self.application.settings["waiters"].discard(self.waiter)


class Waiting(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write(str(len(self.application.settings["waiters"])))


class Kept(tornado.web.RequestHandler):
    """The bytes that were put under a name, with the status and the ETag that came with them: nothing is hashed."""

    kept: dict[str, tuple[int, str, bytes]] = {}

    def put(self, name: str) -> None:
        headers = self.request.headers
        self.kept[name] = int(headers["X-Status"]), headers["X-ETag"], self.request.body

    def get(self, name: str) -> None:
        status, self.etag, content = self.kept[name]
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.write(content)

    def post(self, name: str) -> None:
        json.loads(self.request.body)
        self.get(name)

    def compute_etag(self) -> str | None:
        return self.etag or None


async def main() -> None:
    application = tornado.web.Application(
        [("/post", Post), ("/wait", Wait), ("/waiting", Waiting), ("/kept/(.*)", Kept)],
        waiters=set(),
        log_function=lambda handler: None,
    )
    server = tornado.httpserver.HTTPServer(application)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1", backlog=4096)
    server.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if "--uvloop" in sys.argv:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
