"""Tokenizers with chat templates in the forms that models are published with."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_models import byte_tokenizer

# ChatML, as Qwen2's and SmolLM2's, with and without marks around the answers.
_CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
OPEN{{- message['content'] | trim + '<|im_end|>' -}}CLOSE
{{- '\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>' + '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
CHATML = _CHATML.replace("OPEN", "").replace("CLOSE", "")
MARKED = _CHATML.replace("OPEN", "{%- generation -%}").replace("CLOSE", "{%- endgeneration -%}")
# A BOS at the start, no system role, roles in turns: as Gemma's.
GEMMA = """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}
{{- '<|im_start|>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'
    + message['content'] | trim + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>model\n' -}}{%- endif -%}"""
# The reasoning of all answers but the last is left out: as Qwen3's.
REASONING = """{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def chat_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Any:
    """The byte tokenizer with a chat template. bos: it puts `<|begin|>` before a text."""
    from tokenizers import processors

    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            pair="<|begin|> $A <|begin|> $B",
            special_tokens=[("<|begin|>", tokenizer.bos_token_id)],
        )
    return tokenizer
