"""The named chat templates, as Jinja.

Each renders the format that its model family was trained on (from model cards and tokenizers), without BOS, which depends on
the tokenizer.
"""

from __future__ import annotations

_TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'"

_QWEN_TOOLS = """\
{%- macro tools_block() -%}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": ' -}}
    {{- '<args-json-object>}\\n</tool_call>' -}}
{%- endmacro -%}
{%- macro calls(message, content) -%}
    {%- for call in message.tool_calls or [] -%}
        {%- set call = call.function or call -%}
        {%- set given = call.arguments if call.arguments is string else (call.arguments | tojson) -%}
        {{- '\\n' if content or not loop.first else '' -}}
        {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + given + '}\\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro tool_result(message, before, after) -%}
    {%- if before is undefined or before.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if after is undefined or after.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endmacro -%}
"""

_QWEN2_5 = (
    _QWEN_TOOLS
    + """\
{%- set given = messages[0].role == 'system' -%}
{%- set system = messages[0].content if given else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{{- '<|im_start|>system\\n' + system + ('\\n\\n' + tools_block() if tools else '') + '<|im_end|>\\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- tool_result(message, loop.previtem, loop.nextitem) -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = message.content or '' -%}
        {{- '<|im_start|>assistant\\n' + content + calls(message, content) + '<|im_end|>\\n' -}}
    {%- elif message.role != 'system' or not loop.first -%}
        {{- """
    + _TURN
    + """ -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

# Thinking is rendered only after the last question, as in the model's own template.
_QWEN3 = (
    _QWEN_TOOLS
    + """\
{%- set given = messages[0].role == 'system' -%}
{%- if given or tools -%}
    {{- '<|im_start|>system\\n' + (messages[0].content if given else '') -}}
    {{- (('\\n\\n' if given else '') + tools_block()) if tools else '' -}}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- set last = namespace(question=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>')
                                           and message.content.endswith('</tool_response>')) -%}
        {%- set last.question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- tool_result(message, loop.previtem, loop.nextitem) -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = message.content or '' -%}
        {%- set thought = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set thought = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > last.question and (loop.last or thought) -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
        {%- else -%}
            {{- content -}}
        {%- endif -%}
        {{- calls(message, content) + '<|im_end|>\\n' -}}
    {%- elif message.role != 'system' or not loop.first -%}
        {{- """
    + _TURN
    + """ -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '') -}}
{%- endif -%}
"""
)

_LLAMA3 = """\
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Gemma has no system turn: the system message is placed before the first user turn.
_GEMMA = """\
{%- set first = messages[0] -%}
{%- set system = first.content | trim + '\\n\\n' if first.role in ('system', 'developer') else '' -%}
{%- for message in messages -%}
    {%- if message.role not in ('user', 'assistant') -%}
        {%- if not loop.first -%}{{- raise_exception('it has no ' + message.role + ' turns') -}}{%- endif -%}
    {%- else -%}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' -}}
        {{- system if loop.index0 == 1 else '' -}}
        {{- message.content | trim + '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# The system message is placed before the *last* question, so earlier answers have another context.
_MISTRAL = """\
{%- set first = messages[0] -%}
{%- set system = first.content + '\\n\\n' if first.role in ('system', 'developer') else '' -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '[INST] ' + (system if loop.index0 == last.question else '') + message.content + '[/INST]' -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content | trim + eos_token -}}
    {%- elif not loop.first -%}
        {{- raise_exception('it has no ' + message.role + ' turns') -}}
    {%- endif -%}
{%- endfor -%}
"""

NAMED = {
    "base": (
        "{% for message in messages %}"
        "{{ message['content'] + ((eos_token | default('')) if message['role'] == 'assistant' else '\\n') }}"
        "{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ " + _TURN + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "empty": (
        "{% for message in messages %}"
        "{{ message['content'] + ((eos_token | default('')) if message['role'] == 'assistant' else '') }}"
        "{% endfor %}"
    ),
    "gemma": _GEMMA,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "qwen2_5": _QWEN2_5,
    "qwen3": _QWEN3,
}
"""Name -> Jinja source."""

_CHATML = ("<|im_start|>", "<|im_end|>")

MARKERS = {
    "chatml": _CHATML,
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen2_5": _CHATML,
    "qwen3": _CHATML,
}
"""Name -> markers for which the tokenizers of that family have special tokens."""

QWEN = {"qwen2_5": "You are Qwen", "qwen3": "<think>"}  # text that identifies the family's own template
"""Names that select the tokenizer's own template if it is a Qwen template, because details differ between Qwen models."""

LONG_COT = ("longCOT_qwen2.5", "longcot_V3")
"""Names that select the tokenizer's own template with additions for long chains of thought."""

LONG_COT_QUESTION = ("Return your final response within \\boxed{}. ", "")
"""Text of longCOT_qwen2.5 before and after the question."""

LONG_COT_SYSTEM = (
    "Think about the question for as long as it needs, step by step, before you commit to an answer: explore, summarise what "
    "you have found, check it, go back where it fails, and try again. Answer in two parts. The first is your thinking, its "
    "steps separated by blank lines, between <|begin_of_thought|> and <|end_of_thought|>. The second is the solution alone, "
    "exact, clear and brief, with the steps that lead to the result, between <|begin_of_solution|> and <|end_of_solution|>."
)
"""Default system message of longCOT_qwen2.5. It describes the format of that recipe in our own words."""

LONG_COT_OPENING = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
"""Text of longcot_V3 after the generation prompt; the answer continues from it."""
