"""LangChain's ChatOpenAI against a live server."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from conftest import MODEL


@pytest.fixture(scope="module")
def chat(url):
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="any", temperature=0, max_tokens=32, timeout=300, max_retries=0)


def test_invoke(chat):
    answer = chat.invoke("Why is the sky blue?")
    assert "light" in answer.content
    assert answer.usage_metadata["output_tokens"] <= 32
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
    answer = chat.invoke(messages)
    assert answer.content != chat.invoke(messages[-1:]).content, "what was said before counts"
    assert answer.usage_metadata["input_tokens"] > chat.invoke(messages[-1:]).usage_metadata["input_tokens"]


def test_a_chain(chat):
    chain = ChatPromptTemplate.from_messages([("user", "Why is the {thing} blue?")]) | chat | StrOutputParser()
    assert "light" in chain.invoke({"thing": "sky"})


def test_asynchronous(chat):
    import asyncio

    async def run():
        parts = [chunk.content async for chunk in chat.astream("Say hi.")]
        return "".join(parts), (await chat.ainvoke("Say hi.")).content

    streamed, whole = asyncio.run(run())
    assert streamed == whole
