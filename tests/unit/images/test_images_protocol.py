"""The host's side of the agent: what it takes, what it refuses, and that it finds the agent behind any junk."""

import itertools
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_images.guest.protocol import (
    MAX_DATA,
    MAX_HEADER,
    PIECE_SIZE,
    TRANSITIONS,
    AgentBusyError,
    AgentEvent,
    AgentProtocol,
    AgentState,
    Done,
    Exited,
    Failed,
    FileData,
    Hello,
    ProtocolError,
    Ready,
    Reply,
    quote,
)

NONCE = "0123456789abcdef"


def idle() -> AgentProtocol:
    protocol = AgentProtocol()
    protocol.hello(NONCE)
    assert protocol.receive(b"\n@hello %b 1\n" % NONCE.encode()) == [Hello(1)]
    return protocol


@given(junk=st.binary(max_size=400), rest=st.binary(max_size=50), cut=st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_hello_is_found_behind_any_junk_in_any_pieces(junk: bytes, rest: bytes, cut: int) -> None:
    protocol = AgentProtocol()
    protocol.hello(NONCE)
    stream = junk + b"\n@hello %b 1\n" % NONCE.encode()
    replies = [
        reply
        for start in range(0, len(stream), cut)
        for reply in protocol.receive(stream[start : start + cut])
    ]
    assert replies[-1] == Hello(1)
    protocol.shell("true")
    protocol.receive(b"@exit 1 0 %d 0 %d 0\n" % (len(rest), len(rest)))
    assert protocol.receive(rest) == ([Exited(1, 0, rest, b"", len(rest), 0)] if rest else [])


@given(
    out=st.binary(max_size=300),
    err=st.binary(max_size=300),
    status=st.integers(0, 255),
    cut=st.integers(1, 80),
)
@settings(max_examples=200, deadline=None)
def test_a_result_survives_any_cutting(out: bytes, err: bytes, status: int, cut: int) -> None:
    protocol = idle()
    number, _ = protocol.exec(["id"])
    stream = (
        b"@exit %d %d %d %d %d %d\n" % (number, status, len(out), len(err), len(out), len(err)) + out + err
    )
    replies: list[Reply] = []
    for start in range(0, len(stream), cut):
        replies += protocol.receive(stream[start : start + cut])
    assert replies == [Exited(number, status, out, err, len(out), len(err))]
    assert protocol.state is AgentState.IDLE


@given(st.binary(max_size=2000), st.sampled_from(["lost", "hello", "idle", "exec", "get", "put"]))
@settings(max_examples=300, deadline=None)
def test_a_hostile_guest_gets_an_error_or_silence_and_no_memory(data: bytes, stage: str) -> None:
    protocol = AgentProtocol() if stage in ("lost", "hello") else idle()
    if stage == "hello":
        protocol.hello(NONCE)
    elif stage == "exec":
        protocol.exec(["id"], limit_bytes=10)
    elif stage == "get":
        protocol.get("/x", limit_bytes=10)
    elif stage == "put":
        protocol.put("/x", b"")
    try:
        for start in range(0, len(data), 7):
            protocol.receive(data[start : start + 7])
    except ProtocolError:
        assert protocol.state is AgentState.LOST
    assert len(protocol._buffer) <= 2 * MAX_HEADER + 20
    protocol.hello(NONCE)


@given(st.lists(st.binary(max_size=40).filter(lambda word: b"\0" not in word), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_shell_reads_words_as_they_were_quoted(words: list[bytes]) -> None:
    line = b" ".join(map(quote, words))
    assert b"\n" not in line
    script = b'eval "set -- $1"; for w; do printf \'%s\\0\' "$w"; done'
    done = subprocess.run(["busybox", "sh", "-c", script, "sh", line], capture_output=True, check=True)
    assert done.stdout == b"".join(word + b"\0" for word in words)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"@exit 1 0 11 0 11 0\n", "11 bytes announced, 10 allowed"),
        (b"@exit 1 0 0 99999999999 0 0\n", "99999999999 bytes announced, 10 allowed"),
        (b"@exit 2 0 0 0 0 0\n", "answer to request 2, but 1 was asked"),
        (b"@exit 1 256 0 0 0 0\n", "exit status 256 exceeds 255"),
        (b"@exit 1 0 0 0 0\n", "needs 6 numbers"),
        (b"@exit 1 0 -1 0 0 0\n", "needs 6 numbers"),
        (b"@exit 1 0 " + b"1" * 19 + b" 0 0 0\n", "needs 6 numbers"),
        (b"@data 1 0\n", "is no answer to the request, @exit is"),
        (b"@fail 1 8193\n", "8193 bytes announced, 8192 allowed"),
        (b"@nonsense\n", "is no answer"),
        (b"x" * MAX_HEADER, f"header line exceeds {MAX_HEADER} bytes"),
    ],
)
def test_a_wrong_answer_is_a_violation(answer: bytes, message: str) -> None:
    protocol = idle()
    protocol.exec(["id"], limit_bytes=10)
    with pytest.raises(ProtocolError, match=message):
        protocol.receive(answer)
    assert protocol.state is AgentState.LOST


def test_an_answer_without_a_request_is_a_violation() -> None:
    with pytest.raises(ProtocolError, match="without a request"):
        idle().receive(b"@done 0\n")


def test_another_version_is_a_violation() -> None:
    protocol = AgentProtocol()
    protocol.hello(NONCE)
    with pytest.raises(ProtocolError, match="the agent speaks version 2, we 1"):
        protocol.receive(b"\n@hello %b 2\n" % NONCE.encode())


@pytest.mark.parametrize("stage", ["lost", "hello", "idle", "exec"])
def test_an_agent_that_starts_is_noticed_in_every_state(stage: str) -> None:
    protocol = AgentProtocol() if stage in ("lost", "hello") else idle()
    if stage == "hello":
        protocol.hello(NONCE)
    elif stage == "exec":
        protocol.exec(["id"])
    assert protocol.receive(b"\n@ready 1\n") == [Ready()]
    assert protocol.state is AgentState.LOST


def test_the_kinds_of_answers() -> None:
    protocol = idle()
    assert protocol.receive(b"\n\n") == []
    protocol.get("/f")
    assert protocol.receive(b"@data 1 3\nab\n") == [FileData(1, b"ab\n")]
    _, parts = protocol.put("/f g", b"x" * (PIECE_SIZE + 1), mode=0o755)
    assert b"".join(parts) == b"put 2 755 $'/f g'\npiece %d\n%bpiece 1\nxend\n" % (
        PIECE_SIZE,
        b"x" * PIECE_SIZE,
    )
    assert protocol.receive(b"@done 2\n") == [Done(2)]
    protocol.get("/f")
    assert protocol.receive(b"@fail 3 4\nno\xff!") == [Failed(3, "no\ufffd!")]


def test_requests_need_an_idle_agent_and_sane_arguments() -> None:
    protocol = AgentProtocol()
    with pytest.raises(AgentBusyError, match="the agent is lost"):
        protocol.exec(["id"])
    protocol = idle()
    for call, message in (
        (lambda: protocol.exec([]), "argv is empty"),
        (lambda: protocol.exec(["a\0b"]), "NUL"),
        (lambda: protocol.exec(["x" * 70000]), "request of 700.. bytes exceeds 65536"),
        (lambda: protocol.get("/x", limit_bytes=MAX_DATA + 1), "limit of"),
        (lambda: protocol.put("/x", b"", mode=0o10000), "mode"),
        (lambda: protocol.hello("not hex; reboot"), "nonce"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert protocol.state is AgentState.IDLE
    with pytest.raises(AgentBusyError, match="no command is running"):
        protocol.kill()
    protocol.exec(["id"])
    assert protocol.kill() == b"kill\n"
    with pytest.raises(AgentBusyError, match="the agent is waiting"):
        protocol.get("/x")


def test_resync_fills_the_largest_piece_first() -> None:
    assert AgentProtocol().resync(NONCE) == b" " * PIECE_SIZE + b"\nhello 0123456789abcdef\n"


@pytest.mark.parametrize("pair", list(itertools.product(AgentState, AgentEvent)))
def test_every_pair_of_state_and_event(pair: tuple[AgentState, AgentEvent]) -> None:
    """Hello, a violation and a restart are possible always; the rest only in their order."""
    state, event = pair
    expected = {
        AgentEvent.SAID_HELLO: AgentState.SYNCING,
        AgentEvent.VIOLATED: AgentState.LOST,
        AgentEvent.RESTARTED: AgentState.LOST,
        AgentEvent.HEARD_HELLO: AgentState.IDLE if state is AgentState.SYNCING else None,
        AgentEvent.REQUESTED: AgentState.WAITING if state is AgentState.IDLE else None,
        AgentEvent.ANSWERED: AgentState.IDLE if state is AgentState.WAITING else None,
    }[event]
    assert TRANSITIONS.get(pair) is expected


def test_a_hello_that_was_said_again_may_be_answered_again() -> None:
    """Late answers to the same hello are passed over, idle and before the answer to a request; another's are not."""
    protocol = AgentProtocol()
    protocol.hello(NONCE)
    protocol.hello(NONCE)
    answer = b"\n@hello %b 1\n" % NONCE.encode()
    assert protocol.receive(answer + answer) == [Hello(1)]
    protocol.exec(["true"])
    assert protocol.receive(answer + b"@exit 1 0 0 0 0 0\n") == [Exited(1, 0, b"", b"", 0, 0)]
    with pytest.raises(ProtocolError, match="without a request"):
        protocol.receive(b"\n@hello 0000000000000000 1\n")
