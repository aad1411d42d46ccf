"""Bad and hostile requests over HTTP: each gets OpenAI's error shape, says what is wrong, and the server goes on."""

import json
import socket
import struct
import time

import pytest

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def alive_afterwards(http_server, chat_body):
    yield
    status, answer = http_server.post(CHAT, chat_body(max_tokens=1))
    assert status == 200, answer


def error_of(status, answer, expected=400):
    assert status == expected, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def raw_chat(**replacements):
    """A body as text in which values may be no JSON."""
    fields = {"model": '"forge"', "messages": '[{"role":"user","content":"hi"}]', "max_tokens": "4", **replacements}
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model":"forge","messages":[{"role":"user","content":"\xc3\x28"}]}',
        b'{"model":"forge","messages":[{"role":"user","content":"\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model":"forge","model":"forge","messages":[]}',
        b"{}",
        b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_request(http_server, body):
    error = error_of(*http_server.post(CHAT, body))
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", "0"),
        ("n", "-1"),
        ("n", "1000000"),
        ("n", "99999999999999999999999"),
        ("n", "1.5"),
        ("n", '"2"'),
        ("max_tokens", "0"),
        ("max_tokens", "-5"),
        ("max_tokens", "1e3"),
        ("max_tokens", "4294967296"),
        ("temperature", "-0.1"),
        ("temperature", "2.1"),
        ("temperature", '"hot"'),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("top_p", "[]"),
        ("top_k", "-2"),
        ("min_p", "2"),
        ("presence_penalty", "3"),
        ("frequency_penalty", "-3"),
        ("repetition_penalty", "0"),
        ("seed", "1.5"),
        ("seed", "1e30"),
        ("stop", "5"),
        ("stop", '[""]'),
        ("stop", '["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]'),
        ("logit_bias", '{"0": 101}'),
        ("logit_bias", '{"x": 1}'),
        ("logit_bias", '{"99999999": 1}'),
        ("logit_bias", "[]"),
        ("stream", '"yes"'),
        ("stream_options", '{"include_usage": true}'),
        ("top_logprobs", "2"),
        ("messages", "[]"),
        ("messages", '"hi"'),
        ("messages", '[{"role":"wizard","content":"hi"}]'),
        ("messages", '[{"role":"user"}]'),
        ("messages", '[{"role":"user","content":7}]'),
        ("messages", '[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]'),
        ("messages", '[{"role":"user","content":"hi","extra":1}]'),
        ("model", "7"),
        ("response_format", '{"type":"json_object"}'),
        ("tools", '[{"type":"function","function":{"name":"f"}}]'),
        ("best_of", "2"),
        ("a_field_that_does_not_exist", "1"),
    ],
)
def test_values_that_are_refused(http_server, field, value):
    error = error_of(*http_server.post(CHAT, raw_chat(**{field: value})))
    named = f"{error['param']} {error['message']}"
    assert field in named, named


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_no_json(http_server, value):
    error_of(*http_server.post(CHAT, raw_chat(temperature=value)))


def test_an_unknown_model_is_404(http_server, chat_body):
    error = error_of(*http_server.post(CHAT, chat_body(model="gpt-17")), expected=404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_unknown_routes_and_methods(http_server):
    status, _, body = http_server.get("/v1/nothing")
    error_of(status, json.loads(body), expected=404)
    status, headers, body = http_server.get(CHAT)
    error_of(status, json.loads(body), expected=405)
    assert "POST" in {name.lower(): value for name, value in headers.items()}["allow"]


def test_another_content_type(http_server):
    status, _, body = http_server.request("POST", CHAT, raw_chat(), {"content-type": "text/plain"})
    error_of(status, json.loads(body), expected=415)


def test_a_prompt_over_the_context(http_server):
    body = {"model": "forge", "prompt": [5] * 50_000, "max_tokens": 1}
    error = error_of(*http_server.post("/v1/completions", body))
    assert error["code"] == "context_length_exceeded"
    assert "50000" in error["message"]


def test_token_ids_outside_the_vocabulary(http_server):
    for prompt in ([1 << 30], [-1], [1.5], [[1], ["a"]]):
        error_of(*http_server.post("/v1/completions", {"model": "forge", "prompt": prompt, "max_tokens": 1}))
    error_of(*http_server.post("/detokenize", {"model": "forge", "tokens": [1 << 30]}))


def test_a_body_over_the_limit(http_server):
    connection = socket.create_connection(http_server.address, timeout=60)
    try:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        connection.sendall(b"content-length: 99999999999\r\n\r\n{")
        answer = connection.recv(65536)
    finally:
        connection.close()
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]


def test_bytes_that_are_no_http(http_server):
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"A" * 100_000):
        connection = socket.create_connection(http_server.address, timeout=10)
        try:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1024)
        except OSError:
            pass  # A reset is an answer as well.
        finally:
            connection.close()


def test_a_client_that_leaves_in_the_middle(http_server):
    """Cut off without warning while tokens flow: everything the request held is freed."""
    body = json.dumps(
        {"model": "forge", "messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 1500,
         "temperature": 0, "ignore_eos": True, "stream": True}
    ).encode()  # fmt: skip
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connections = []
    for _ in range(4):
        connection = socket.create_connection(http_server.address, timeout=60)
        connection.sendall(head.encode() + body)
        connections.append(connection)
    for connection in connections:
        seen = b""
        while seen.count(b"data: ") < 3:
            seen += connection.recv(65536)
    assert http_server.metric("forge_requests_running") == 4
    for connection in connections:
        # No linger: a reset, as when a machine vanishes behind a proxy.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    http_server.wait_for_metric("forge_requests_running", 0)
    http_server.wait_for_metric("forge_kv_cache_usage_ratio", 0)


def test_a_client_that_leaves_while_waiting_for_a_whole_answer(http_server, chat_body):
    body = json.dumps(chat_body("Tell a story.", max_tokens=1500, ignore_eos=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(http_server.address, timeout=60)
    connection.sendall(head.encode() + body)
    http_server.wait_for_metric("forge_requests_running", 1)
    time.sleep(0.1)
    connection.close()
    http_server.wait_for_metric("forge_requests_running", 0)


def test_a_client_that_sends_half_a_request(http_server):
    connection = socket.create_connection(http_server.address, timeout=60)
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    connection.close()
