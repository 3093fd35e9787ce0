"""A tokenizer whose ids can be read: a byte's id is its value, so that the golden ids of the tests are ASCII codes.

One merge, "ab" -> 256, so that ids and text are not the same thing; the special tokens are 257 to 259. The template is our own; it has the
turn marks of Qwen2.5, its default system prompt, its merging of consecutive tool results, and its separator after the end of a turn.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

AB, END_OF_TEXT, START, END = 256, 257, 258, 259

TEMPLATE = """
{%- if messages[0].role == 'system' -%}
    {%- set rest = messages[1:] -%}{%- set system = messages[0].content -%}
{%- else -%}
    {%- set rest = messages -%}{%- set system = 'Help.' -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + system -}}
{%- for tool in tools or [] -%}{{- '\\nTool: ' + tool.name -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- for message in rest -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<r>' + message.content + '</r>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one merge, Qwen's marks, and the template above."""
    letters = _letters_of_bytes()
    vocabulary = {letter: byte for byte, letter in letters.items()} | {"ab": AB}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _letters_of_bytes() -> dict[int, str]:
    """The printable letter under which byte-level BPE stores each byte (the GPT-2 table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
