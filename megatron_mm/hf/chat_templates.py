"""Chat templates as Jinja, for exported tokenizers: they produce the same tokens as in training.

A message's content is a text, or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`. A conversation that ends with a
question is a prompt; `add_generation_prompt=True` adds the text that precedes an answer. A conversation that ends with an answer is written
like a training document. Questions and answers must alternate, as in training; anything else is an error.
"""

from __future__ import annotations

import json

from megatron_mm.data.text.chat import CHAT_TEMPLATES, SYSTEM, ChatTemplate, Parts
from megatron_mm.data.text.items import Control

_NAMES = {"<s>": "bos_token", "</s>": "eos_token"}


def jinja_template(template: ChatTemplate, *, image: str = "<image>", begins_with_bos: bool = True) -> str:
    """Jinja source of a template.

    Args:
        image: text that represents an image; a processor may replace it with all of the image's tokens.
        begins_with_bos: write the begin-of-text token. Otherwise the tokenizer must add it, as it does by default.
    """
    bos = "{{- bos_token }}" if begins_with_bos else ""
    end = "{{- eos_token }}" if template.supervises_eos else ""
    return "".join(
        [
            "{%- macro text(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}",
            f"{{%- if part.type == 'image' -%}}{{{{- {_quoted(image)} -}}}}{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}",
            "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
            bos,
            "{%- if messages[0].role == 'system' -%}",
            _write(template.opening_with_system, system="text(messages[0].content)"),
            "{%- set turns = messages[1:] -%}{%- else -%}",
            _write(template.opening),
            "{%- set turns = messages -%}{%- endif -%}",
            "{%- for turn in turns -%}{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}",
            "{{- raise_exception('questions and answers must take turns, and a question comes first') }}{%- endif -%}",
            f"{{%- if turn.role == 'user' -%}}{{%- if not loop.first -%}}{_write(template.before_question)}{{%- endif -%}}",
            "{{- text(turn.content) }}",
            f"{{%- if not loop.last -%}}{_write(template.before_answer)}",
            f"{{%- elif add_generation_prompt -%}}{_write(template.prompt_end[0])}{{%- endif -%}}",
            f"{{%- else -%}}{{{{- text(turn.content) }}}}{{%- if loop.last -%}}{_write(template.after_last_answer)}{end}",
            f"{_write((template.after_all,) if template.after_all else ())}",
            f"{{%- else -%}}{_write(template.after_answer)}{{%- endif -%}}{{%- endif -%}}{{%- endfor -%}}",
        ]
    )


def exported_template(name: str | None, *, image: str = "<image>", begins_with_bos: bool = True) -> str | None:
    """Jinja source of a template, by its name; None for a run without a template."""
    return None if name is None else jinja_template(CHAT_TEMPLATES[name], image=image, begins_with_bos=begins_with_bos)


def chat_control_tokens(name: str | None) -> tuple[str, ...]:
    """Control tokens of a template, other than begin and end of text, that an exported tokenizer must know; empty without a template."""
    return () if name is None else tuple(token for token in CHAT_TEMPLATES[name].control_tokens if token not in _NAMES)


def _write(parts: Parts, *, system: str = "") -> str:
    """Jinja that writes parts. `<s>` and `</s>` are written by the tokenizer's variables for them.

    Args:
        system: Jinja expression for a conversation's own system prompt.
    """
    words = []
    for part in parts:
        if isinstance(part, Control):
            words.append(_NAMES.get(part.token, _quoted(part.token)))
        else:
            words.append(system if part == SYSTEM else _quoted(part))
    return f"{{{{- {' + '.join(words)} }}}}" if words else ""


def _quoted(text: str) -> str:
    """Write a text as a Jinja string; Jinja accepts JSON strings."""
    return json.dumps(text, ensure_ascii=False)
