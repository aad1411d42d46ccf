"""LangChain's ChatOpenAI against a live server."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from conftest import MODEL


@pytest.fixture(scope="module")
def chat(url):
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="any", temperature=0, max_tokens=16, timeout=300, max_retries=0)


def test_invoke(chat):
    answer = chat.invoke("What is the capital of France?")
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] <= 16
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


def test_stream_equals_invoke(chat):
    prompt = "Name three colours."
    assert "".join(chunk.content for chunk in chat.stream(prompt)) == chat.invoke(prompt).content


def test_batch_equals_single_calls(chat):
    prompts = ["Say hi.", "What is 2 + 2?", "Name a bird."]
    assert [answer.content for answer in chat.batch(prompts)] == [chat.invoke(prompt).content for prompt in prompts]


def test_a_conversation(chat):
    messages = [
        SystemMessage("You are brief."),
        HumanMessage("My name is Nadia."),
        AIMessage("Hello Nadia!"),
        HumanMessage("What is my name?"),
    ]
    assert "Nadia" in chat.invoke(messages).content


def test_a_chain(chat):
    chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | chat | StrOutputParser()
    assert "Berlin" in chain.invoke({"country": "Germany"})


def test_asynchronous(chat):
    import asyncio

    async def run():
        parts = [chunk.content async for chunk in chat.astream("Say hi.")]
        return "".join(parts), (await chat.ainvoke("Say hi.")).content

    streamed, whole = asyncio.run(run())
    assert streamed == whole
