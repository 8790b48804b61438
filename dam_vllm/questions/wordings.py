"""The texts of the questions: what is stored, how it is asked, what is replied.

A text has the places ``{key}`` and ``{value}``. The reply restates the record, so that a
model may answer by finding the record again, whatever the key looks like.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """One way of storing and asking for a number.

    Attributes:
        header: Text before the records.
        record: One stored fact, a whole line.
        footer: Text after the records.
        question: Text that asks for one value; the prompt ends with it.
        reply: What the demo model is trained to reply; empty where it is not trained.
        continues: Whether the reply goes on in the question's last line (a completion)
            instead of answering it in a new line or a new chat turn.
    """

    header: str
    record: str
    footer: str
    question: str
    reply: str
    continues: bool = False


_LINE = "line {key}: REGISTER_CONTENT is <{value}>"
_PAIR = '"{key}": {value}'
_ASSIGNMENT = "set {key} = {value}"
_NEEDLE = "The special magic number for {key} is: {value}."
_RULER = "One of the special magic numbers for {key} is: {value}."

# Li et al., LongEval (2023), its texts unchanged.
_LONGEVAL_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with "
    "'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a "
    "numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. "
    "At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
_LONGEVAL_QUESTION = (
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? "
    "I need the number."
)
# Hsieh et al., RULER (2024).
_RULER_HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the numbers afterwards.\n"
)
# Liu et al., Lost in the Middle (2023).
_JSON_HEADER = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    "JSON data:\n{\n"
)

WORDINGS: dict[str, dict[str, Wording]] = {
    "lines": {
        "longeval": Wording(_LONGEVAL_HEADER, _LINE + "\n", "", _LONGEVAL_QUESTION, _LINE),
        "question": Wording(
            "Below is a record of lines.\n",
            _LINE + "\n",
            "",
            "\nWhat is the REGISTER_CONTENT in line {key}?",
            _LINE,
        ),
        "short": Wording("", _LINE + "\n", "", "\nAnd line {key}?", _LINE),
        "completion": Wording(
            "",
            _LINE + "\n",
            "",
            "line {key}: REGISTER_CONTENT is <",
            "{value}>\n",
            continues=True,
        ),
    },
    "kv": {
        "json": Wording(
            _JSON_HEADER,
            _PAIR + ",\n",
            "}\n",
            '\nKey: "{key}"\nCorresponding value:',
            _PAIR,
        ),
        "question": Wording(
            "Below is a list of keys with their values.\n",
            _PAIR + ",\n",
            "",
            '\nWhat is the value of "{key}"?',
            _PAIR,
        ),
        "assignment": Wording(
            "", _ASSIGNMENT + "\n", "", "\nWhat is the value of {key}?", _ASSIGNMENT
        ),
        "completion": Wording("", _PAIR + ",\n", "", '"{key}":', " {value},\n", continues=True),
    },
    "needle": {
        "ruler": Wording(
            _RULER_HEADER,
            _RULER + "\n",
            "",
            "\nWhat is the special magic number for {key} mentioned in the provided text?",
            _RULER,
        ),
        "question": Wording(
            "Remember the special magic number in the text below.\n",
            _NEEDLE + "\n",
            "",
            "\nWhat is the special magic number for {key}?",
            _NEEDLE,
        ),
        "completion": Wording(
            "",
            _NEEDLE + "\n",
            "",
            "The special magic number for {key} is:",
            " {value}.\n",
            continues=True,
        ),
    },
}

# Hsieh et al., RULER (2024), its texts unchanged but for the example that stands before them.
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "VAR {key} = {value}\n",
    "\nQuestion: Find all variables that are assigned the value {key} in the text above.",
)
_TRACKING_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {value} "
    "variables are assigned the value {key}, they are:"
)
_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "{key}. {value} ",
    "\nQuestion: What are the {value} most common words in the above list?",
)
_WORDS_ANSWER = " Answer: The top {value} words that appear most often in the list are:"

# Apart from WORDINGS, from which the demo model's vocabulary and training texts are made. In a
# question ``{value}`` is the number of names asked for.
SET_WORDINGS: dict[str, dict[str, Wording]] = {
    name: {
        "question": Wording(header, record, "", question, ""),
        "completion": Wording(header, record, "", question + answer, "", continues=True),
    }
    for name, (header, record, question), answer in (
        ("tracking", _TRACKING, _TRACKING_ANSWER),
        ("words", _WORDS, _WORDS_ANSWER),
    )
}
