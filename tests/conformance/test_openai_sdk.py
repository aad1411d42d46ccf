"""The openai Python SDK against a live server: what applications actually do."""

import http.client
import http.server
import math
import threading

import openai
import pytest

from conftest import MODEL

PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=PROMPT, max_tokens=32, temperature=0)
    choice = answer.choices[0]
    assert "light" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 32
    assert answer.system_fingerprint


def test_stream_equals_the_whole_answer(client):
    settings = dict(model=MODEL, messages=PROMPT, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**settings).choices[0]
    chunks = list(client.chat.completions.create(**settings, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert reasons == [whole.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=PROMPT, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    last = chunks[-1]
    assert last.choices == []
    assert last.usage.completion_tokens <= 8
    assert last.usage.prompt_tokens > 10
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_broken_characters_in_a_stream(client):
    prompt = "Repeat exactly: 😀 café 日本語 naïve 😀"
    settings = dict(model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=40, temperature=0)
    whole = client.chat.completions.create(**settings).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**settings, stream=True) if c.choices]
    assert "".join(parts) == whole


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in answer.choices[0].text
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 4


def test_completions_stream(client):
    settings = dict(model=MODEL, prompt="Once upon a time", max_tokens=16, temperature=0)
    whole = client.completions.create(**settings).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True) if chunk.choices]
    assert "".join(parts) == whole


def test_lists_of_prompts(client):
    prompts = ["The sun is", "One two three", "Roses are"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [client.completions.create(model=MODEL, prompt=p, max_tokens=6, temperature=0).choices[0].text for p in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_token_ids_as_prompt(client, http_server):
    status, tokens = http_server.post("/tokenize", {"model": MODEL, "prompt": "The sun is"})
    assert status == 200 and tokens["count"] == len(tokens["tokens"])
    by_ids = client.completions.create(model=MODEL, prompt=tokens["tokens"], max_tokens=8, temperature=0)
    by_text = client.completions.create(model=MODEL, prompt="The sun is", max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text
    status, text = http_server.post("/detokenize", {"model": MODEL, "tokens": tokens["tokens"]})
    assert (status, text["prompt"]) == (200, "The sun is")


def test_echo_with_logprobs(client):
    prompt = "The quick brown fox"
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]


def test_scoring_without_generating(client):
    answer = client.completions.create(model=MODEL, prompt="a b c", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "a b c"
    assert answer.usage.completion_tokens == 0


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=PROMPT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        values = [alternative.logprob for alternative in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.logprob == values[0], "greedy takes the most likely"
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert sum(math.exp(value) for value in values) <= 1 + 1e-6


def test_several_answers(client):
    settings = dict(model=MODEL, messages=[{"role": "user", "content": "Tell me a secret."}], max_tokens=12, temperature=1.2, seed=5)
    answer = client.chat.completions.create(**settings, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3, texts
    again = client.chat.completions.create(**settings, n=3)
    assert [choice.message.content for choice in again.choices] == texts
    # Several answers in a stream carry their index.
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**settings, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_seeds_are_reproducible(client):
    def answer(seed):
        settings = dict(model=MODEL, messages=PROMPT, max_tokens=16, temperature=1.5, seed=seed)
        return client.chat.completions.create(**settings).choices[0].message.content

    first = [answer(seed) for seed in range(4)]
    assert [answer(seed) for seed in range(4)] == first
    assert len(set(first)) > 1


def test_stop_strings_never_leak(client):
    settings = dict(model=MODEL, prompt="1, 2, 3, 4, 5, 6,", max_tokens=40, temperature=0)
    free = client.completions.create(**settings).choices[0].text
    assert "9" in free
    answer = client.completions.create(**settings, stop=["9"]).choices[0]
    assert answer.text == free.split("9")[0]
    assert answer.finish_reason == "stop"
    parts = [chunk.choices[0].text for chunk in client.completions.create(**settings, stop=["9"], stream=True) if chunk.choices]
    assert "".join(parts) == answer.text
    # Over the border of tokens as well.
    long = free[3:9]
    assert client.completions.create(**settings, stop=[long]).choices[0].text == free.split(long)[0]


def test_max_tokens_ends_with_length(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Write a long story."}], max_completion_tokens=5, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


def test_logit_bias_forbids_a_token(client, http_server):
    _, tokens = http_server.post("/tokenize", {"model": MODEL, "prompt": " Paris"})
    settings = dict(model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0)
    assert client.completions.create(**settings).choices[0].text == " Paris"
    answer = client.completions.create(**settings, logit_bias={str(tokens["tokens"][0]): -100})
    assert answer.choices[0].text != " Paris"


def test_the_list_of_models(client):
    models = client.models.list().data
    assert models and all(model.object == "model" for model in models)
    served = client.models.retrieve(models[0].id)
    assert served.id == models[0].id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_errors_have_the_sdks_types(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=PROMPT)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=PROMPT, temperature=7)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=PROMPT, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model=MODEL, messages=PROMPT, tools=[tool])
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=PROMPT, extra_body={"no_such_field": 1})
    assert "no_such_field" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 20000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


class FailsOnce(http.server.BaseHTTPRequestHandler):
    """A proxy that answers the first request with a failure and passes the others on."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen += 1
        if self.server.seen == 1:
            answer = b'{"error": {"message": "later", "type": "overloaded", "param": null, "code": null}}'
            self._send(self.server.failure, {"retry-after": "0", "content-type": "application/json"}, answer)
            return
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=120)
        connection.request("POST", self.path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        self._send(response.status, {"content-type": "application/json"}, response.read())
        connection.close()

    def _send(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("failure", [429, 503])
def test_the_sdk_retries(http_server, failure):
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FailsOnce)
    proxy.failure, proxy.seen, proxy.upstream = failure, 0, http_server.address
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{proxy.server_port}/v1"
        client = openai.OpenAI(base_url=address, api_key="any", max_retries=2, timeout=120)
        answer = client.chat.completions.create(model=MODEL, messages=PROMPT, max_tokens=4, temperature=0)
        assert answer.choices[0].message.content
        assert proxy.seen == 2
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_idempotency_key_gives_the_same_answer(client):
    settings = dict(model=MODEL, messages=PROMPT, max_tokens=12, temperature=1.5)
    headers = {"Idempotency-Key": "conformance-1"}
    first = client.chat.completions.create(**settings, extra_headers=headers).choices[0].message.content
    second = client.chat.completions.create(**settings, extra_headers=headers).choices[0].message.content
    assert first == second
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(**{**settings, "max_tokens": 13}, extra_headers=headers)


def test_many_at_once_get_what_they_get_alone(client):
    prompts = [f"Count from {i} to {i + 5}:" for i in range(24)]

    def answer(prompt):
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, temperature=0).choices[0].text

    alone = [answer(prompt) for prompt in prompts]
    together = [None] * len(prompts)

    def work(i):
        together[i] = answer(prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
