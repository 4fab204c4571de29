"""A small server of OpenAI's chat completions on this machine, which can be told to fail. As a script: in a process.

with Stub(faults=["429", "cut", None]) as stub:  # the first requests; later ones are answered well
    stub.url, stub.requests
"""

import argparse
import asyncio
import json
import random
import re
import sys
import threading
from http import HTTPStatus

ADJECTIVES = """amber blunt brass brief broad bronze calmish cheap clean clever coarse cold copper crisp crooked curious
damp dark dear deep dense dim dry dull dusty eager early empty faded faint famous flat foreign fragile fresh frozen
gentle giant glossy golden grand grey hasty heavy hollow humble idle iron jagged keen lame large late lazy lean light
local loose loud lucky marble mild minor modest muddy narrow neat noisy odd pale patient plain polite proud quick rare
rough rusty sandy scarlet sharp shiny silent silver slim slow smooth soft solid sour spare steep stiff stout strange
sudden sweet tall tame tender thick thin timid tiny tired wooden""".split()  # noqa: SIM905
NOUNS = """accordion anchor apron atlas axle badge ballad barge basket beacon blanket boiler bolt bottle bracket bridge
brush bucket bundle button cabin candle canoe cape carpet cart cellar chain chalk chapel chest cliff clock cloak coach
collar compass cradle crate curtain cushion drawer drum engine fence ferry fiddle flask fountain frame funnel garage
glove grain hammer harbour harness hedge helmet hinge hook kettle kite ladder lamp lantern ledger lever locket loom
magnet mast mirror mortar needle oven paddle parcel pearl pebble piano pillow pipe plough pocket pulley quilt raft rail
razor ribbon rope saddle sail satchel saucer scale shelf shovel sieve spade spindle stove tent thread tile""".split()  # noqa: SIM905
VERBS = """blocks borrows brushes buries carries catches covers crosses damages delays drops fills finds fixes follows
forgets gathers guards hides holds leaves lifts loses marks mends moves needs opens packs paints passes pulls pushes
reaches repairs returns rolls scratches sells shakes shows splits steals takes tests throws touches trades turns wants
watches""".split()  # noqa: SIM905
CLOSING = {
    "first": [
        "What should I do?",
        "How should I take this?",
        "What would you do in my place?",
        "What should I say now?",
    ],
    "second": ["What do you do?", "How do you take this?", "What goes through your head?", "What do you say to them?"],
    "third": [
        "What does she do?",
        "How does she take this?",
        "What goes through her head?",
        "What does she say to them?",
    ],
}
WHOSE = {"first": "My", "second": "Your", "third": "Her"}
PERSON = {"Never say I or my": "third", "addressed as you. Nobody": "second", "as I, and asks": "first"}
COPY = "Your neighbour leaves a parcel with you and does not come back for a week or two. What do you do?"


def question(rng, person):
    one, two, three, four = rng.choices(ADJECTIVES, k=4)
    a, b, c, d = rng.choices(NOUNS, k=4)
    does, too = rng.choices(VERBS, k=2)
    story = f"{WHOSE[person]} {one} {a} {does} the {two} {b} on that day, while a {three} {c} {too} the {four} {d}."
    return f"{story} {rng.choice(CLOSING[person])}"


def persona(rng):
    one, two, three, four, five, six = rng.choices(ADJECTIVES, k=6)
    a, b, c = rng.choices(NOUNS, k=3)
    d, e, f, g = rng.choices(NOUNS, k=4)
    return (
        f"You are as {one} as a {two} {a}, {three} with every {b} and {four} without a {c}. Each {d} in your {five} "
        f"{e} is {six}, and what {rng.choice(VERBS)} your {f} also {rng.choice(VERBS)} your {g}."
    )


def rating(prompt):
    """What the stub gives as a judge: it likes long answers, and finds those to short questions fluent."""
    question, answer = re.findall(r"<question>\n(.*?)\n</question>\n<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)[0]
    return 1 + (len(question) if prompt.startswith("Rate how fluent") else len(answer)) % 5


def rating_reply(prompt):
    """As a judge that is asked to be tiresome writes it."""
    number = rating(prompt)
    if "[mumble]" in prompt:
        return "I would rather not say."
    return f'Well, {{"rating": {number}}} it is.' if "[chat]" in prompt else json.dumps({"rating": number})


def reply(request, bad):
    """A good answer to what the product asks; a share ``bad`` of its items is not to be kept."""
    prompt = request["messages"][-1]["content"]
    if "verdicts" in prompt:
        listed = re.findall(r"^(\d+)\. (.*)$", prompt, re.MULTILINE)
        verdicts = [{"question": int(at), "differ": len(text) % 3 > 0} for at, text in listed]
        return json.dumps({"verdicts": verdicts})
    if "Rate how" in prompt:
        return rating_reply(prompt)
    rng = random.Random(request.get("seed"))
    count = int(re.match(r"Write (\d+)", prompt)[1])
    if prompt.startswith(f"Write {count} descriptions"):
        items = [persona(rng) for _ in range(count)]
    else:
        person = next(name for text, name in PERSON.items() if text in prompt)
        items = [question(rng, person) for _ in range(count)]
    spoilt = [(lambda text: text[:-1]), (lambda text: f"{text} Why?"), (lambda _: COPY), (lambda text: f"**{text}**")]
    items = [rng.choice(spoilt)(item) if rng.random() < bad else item for item in items]
    return "Here you are:\n" + "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1))


def completion(request, content, finish="stop"):
    tokens = {"prompt_tokens": len(request["messages"][-1]["content"]) // 4, "completion_tokens": len(content) // 4}
    return {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}],
        "usage": {**tokens, "total_tokens": sum(tokens.values())},
    }


class Stub:
    """Context manager. ``faults`` are those of the first requests; ``share`` of all later ones fail in some way.

    Faults: an HTTP status; reset, cut (half a body), hang, drip (a body that never ends, byte by byte), json (broken),
    text (not JSON), empty (no choices), types (wrong ones), null (no content), huge, packed (gzip), long (cut answer),
    surrogate (characters that no file or terminal should get).
    """

    TRANSIENT = ("429", "500", "reset", "cut", "json", "empty", "types")

    def __init__(self, faults=(), share=0.0, bad=0.0, retry_after="0.05", delay=0.0, seed=0):
        self.faults, self.share, self.bad = list(faults), share, bad
        self.retry_after, self.delay = retry_after, delay
        self.requests, self.headers, self.failed = 0, [], []
        self.bodies = []
        self.schemaless = False  # whether every request that has a schema fails
        self.keep = False  # whether bodies and headers are kept
        self.hold = None  # requests after the first so many are answered only once this is raised or None again
        self._rng = random.Random(seed)
        self._ready = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)

    async def _main(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _fault(self):
        if self.faults:
            return self.faults.pop(0)
        return self._rng.choice(self.TRANSIENT) if self._rng.random() < self.share else None

    async def _serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                size = int(re.search(r"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = json.loads(await reader.readexactly(size))
                self.requests += 1
                if self.keep:
                    self.headers.append(head)
                    self.bodies.append(body)
                fault = "500" if self.schemaless and "response_format" in body else self._fault()
                if not await self._answer(body, fault, writer):
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, request, fault, writer):
        """Whether the connection goes on."""
        if fault is not None:
            self.failed.append(fault)
        number = self.requests
        if self.delay:
            await asyncio.sleep(self.delay)
        while self.hold is not None and number > self.hold:
            await asyncio.sleep(0.01)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "hang":
            await asyncio.sleep(3600)
        status, more = 200, {}
        data = json.dumps(completion(request, reply(request, self.bad))).encode()
        if fault is not None and fault.isdigit():
            status, more = int(fault), {"Retry-After": self.retry_after} if fault == "429" else {}
            data = json.dumps(
                {"error": {"message": f"told to fail; {request.get('user', '')}", "code": fault}}
            ).encode()
        elif fault == "json":
            data = data[: len(data) // 2]
        elif fault == "text":
            data, more = b"<html>hello</html>", {"Content-Type": "text/html"}
        elif fault in ("empty", "types", "null", "huge", "long", "surrogate"):
            data = json.dumps(self._odd(request, fault)).encode()
        elif fault == "packed":
            more = {"Content-Encoding": "gzip"}
        elif fault == "echo":
            status, key = 401, self.headers[-1].split("Bearer ")[1].split("\r\n")[0]
            data = json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), **more}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}\r\n".encode()
        if fault == "cut":
            writer.write(head + data[: len(data) // 2])
            await writer.drain()
            return False
        if fault == "drip":
            writer.write(head)
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        else:
            writer.write(head + data)
        await writer.drain()
        return True

    def _odd(self, request, fault):
        whole = completion(request, reply(request, self.bad))
        choice = whole["choices"][0]
        if fault == "empty":
            whole["choices"] = []
        elif fault == "types":
            choice["message"]["content"] = {"not": ["a", "text"]}
            whole["usage"] = "many"
        elif fault == "null":
            choice["message"]["content"] = None
        elif fault == "surrogate":
            choice["message"]["content"] = choice["message"]["content"].replace(" the ", " the \ud800\0\x1b[31m ")
        elif fault == "huge":
            choice["message"]["content"] = "x" * (3 << 20)
        else:
            choice["finish_reason"] = "length"
            choice["message"]["content"] = choice["message"]["content"][:-20]
        return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bad", type=float, default=0.0)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    with Stub(**vars(parser.parse_args())) as served:
        print(served.url, flush=True)
        sys.stdin.read()
