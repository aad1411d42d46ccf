"""The asynchronous openai client: streams that run side by side, and streams that are given up."""

import asyncio

import openai

from conftest import MODEL


def test_streams_side_by_side(url):
    async def one(client, i):
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Say the number {i}."}], max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*[one(client, i) for i in range(16)])

    answers = asyncio.run(run())
    assert len(answers) == 16 and all(answers)


def test_a_given_up_stream_frees_its_memory(url, http_server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Write a very long story."}],
                max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
            assert http_server.metric("forge_kv_cache_usage_ratio") > 0
            await stream.close()

    asyncio.run(run())
    http_server.wait_for_metric("forge_requests_running", 0)
    http_server.wait_for_metric("forge_kv_cache_usage_ratio", 0)
