"""The prompts on which Forge and llama.cpp are compared, and a text for perplexity. All written for this purpose."""

from pathlib import Path

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*turns, system=_SYSTEM):
    """ChatML of user and assistant turns, ready for the next answer."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


# A document of several kinds of text: prose, notes, code, tables, letters, other languages. Also `forgectl eval kld`'s own.
DOCUMENT = (Path(__file__).parents[2] / "worker/eval/text.txt").read_text()


CASES = {
    # chat
    "chat_sky": chat("Why is the sky blue?"),
    "chat_capital": chat("What is the capital of France?"),
    "chat_story": chat("Write a short story about a robot who learns to paint."),
    "chat_list": chat("List five healthy breakfast ideas with one sentence each."),
    "chat_math": chat("If a train travels 60 km in 45 minutes, what is its average speed in km/h?"),
    "chat_python": chat("Write a Python function that checks whether a string is a palindrome."),
    "chat_haiku": chat("Compose a haiku about autumn rain."),
    "chat_explain": chat("Explain photosynthesis to a ten-year-old."),
    "chat_two_turns": chat("Hi, my name is Nadia.", "Hello Nadia! How can I help you today?", "What is my name?"),
    "chat_four_turns": chat(
        "Name a fruit.", "Apple.", "Name another one.", "Banana.", "And which of the two is usually yellow, and why?"
    ),
    "chat_pirate": chat("Where is the treasure?", system="You are a pirate. Answer every question like one."),
    "chat_json": chat("Give me a JSON object with the keys name, age and city for a fictional person."),
    "chat_translate": chat("Translate to Spanish: The library opens at nine in the morning."),
    "chat_summary": chat("Summarize in one sentence:\n\n" + DOCUMENT.split("\n\n")[0]),
    "chat_empty_system": chat("Who are you?", system=""),
    "chat_email": chat("Draft a polite email asking my landlord to repair the heating."),
    # raw English
    "raw_once": "Once upon a time, in a village at the edge of the forest,",
    "raw_history": "The Roman Empire reached its greatest extent under the emperor",
    "raw_science": "Water boils at 100 degrees Celsius at sea level, but on a high mountain",
    "raw_recipe": "Ingredients:\n- 2 cups of flour\n- 1 teaspoon of baking powder\n-",
    "raw_dialogue": '"You are late," said the clockmaker.\n"I know," said the girl,',
    "raw_numbers": "1, 2, 4, 8, 16, 32,",
    "raw_one_token": "The",
    "raw_newlines": "\n\n\n",
    "raw_spaces": "name        age     city\nAda         36      London\nAlan        41     ",
    "raw_repeat": "tick tock " * 40,
    "raw_quote": "As the old saying goes, a bird in the hand",
    "raw_wiki": "== Early life ==\nMaria Kowalska was born in 1891 in",
    "raw_table": "| x | x^2 |\n|---|-----|\n| 1 | 1   |\n| 2 | 4   |\n| 3 |",
    "raw_shout": "ATTENTION PASSENGERS: THE TRAIN TO",
    # code and markup
    "code_python": "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "code_rust": "/// Returns the largest element of a slice.\nfn largest(values: &[i32]) -> Option<i32> {\n",
    "code_c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "code_sql": "SELECT customers.name, SUM(orders.total)\nFROM customers\nJOIN orders ON",
    "code_html": "<!DOCTYPE html>\n<html>\n<head>\n  <title>My page</title>\n",
    "code_json": '{"users": [{"id": 1, "name": "Ann"}, {"id": 2,',
    "code_shell": "#!/bin/bash\n# Back up every .txt file of a folder\nfor file in",
    "code_javascript": "const sum = (numbers) => numbers.reduce(",
    # other languages and scripts
    "lang_german": "Die Katze sitzt auf dem Dach und schaut",
    "lang_french": "Il était une fois un petit prince qui habitait",
    "lang_spanish": "La ciudad de México es conocida por",
    "lang_russian": "Москва является столицей",
    "lang_chinese": "今天天气很好,我们去",
    "lang_japanese": "むかしむかし、あるところに",
    "lang_arabic": "كان يا ما كان في قديم الزمان",
    "lang_hindi": "भारत की राजधानी",
    "lang_emoji": "I love summer! ☀️🏖️🍦 My favourite",
    # long
    "long_document": DOCUMENT,
    "long_chat": chat("Read this collection of notes.\n\n" + DOCUMENT + "\nWhich buoy was missing, and how was the crust?"),
    "long_half": DOCUMENT[: len(DOCUMENT) // 2],
}
