"""The trainer's own chat templates, by family: their texts alone.

Each writes what the family's own template writes of a question, of what precedes it and of an answer to it, where that
is well defined. It differs where the own one writes a turn otherwise once others follow it (drops a thought, moves the
system's words, ends it differently), or refuses a conversation without need: there a turn is written as it was when it
was the last, so that every prompt is a beginning of the whole.

What families say around tools, and in place of a system's words, is their own text. It is no part of these templates:
`borrowed` of bundled_templates takes it from the model's own template, as the variables

    default_system  what is said where the conversation has no system's words
    tools_intro     what stands before the declared tools
    tools_outro     what stands behind them
"""

# The thought and the answer of a turn of the assistant: the thought is a key of the message, or stands in its content.
_THOUGHTS = r"""
{%- macro thought_of(message) %}
    {%- if message.reasoning_content %}
        {{- message.reasoning_content }}
    {%- elif '</think>' in message.content %}
        {{- (message.content.split('</think>') | first).split('<think>') | last }}
    {%- endif %}
{%- endmacro %}
{%- macro answer_of(message) %}
    {%- if message.reasoning_content %}
        {{- message.content }}
    {%- else %}
        {{- message.content.split('</think>') | last }}
    {%- endif %}
{%- endmacro %}
"""

_NO_TOOLS = r"""
    {%- elif message.role == 'tool' %}
        {{- raise_exception('this bundled template has no place for the result of a call') }}
"""

_CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# Results of tools, as Qwen's templates have them: one turn of the user, however many there are.
_TOOL_RESULTS = r"""
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
"""

# Calls as objects of JSON between marks, behind an answer or without one.
_JSON_CALLS = r"""
{%- macro calls_of(message, answer) %}
    {%- for call in message.tool_calls %}
        {%- if answer or not loop.first %}
            {{- '\n' }}
        {%- endif %}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""

_QWEN3 = (
    _THOUGHTS
    + _JSON_CALLS
    + r"""
{%- if tools %}
    {%- if tools_intro is not defined %}
        {{- raise_exception('this bundled template has a place for tools only with a model whose own has one') }}
    {%- endif %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- tools_intro }}
    {%- for tool in tools %}
        {{- '\n' + tool | tojson }}
    {%- endfor %}
    {{- tools_outro + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set answer = answer_of(message).lstrip('\n') %}
        {{- '<|im_start|>assistant\n<think>\n' + thought_of(message).strip('\n') + '\n</think>\n\n' + answer }}
        {{- calls_of(message, answer) + '<|im_end|>\n' }}
"""
    + _TOOL_RESULTS
    + r"""
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
)

# The assistant may think, and does unless it is told not to.
_MAY_THINK = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
# It always does.
_THINKS = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
"""

_QWEN3_5 = (
    _THOUGHTS
    + r"""
{%- macro calls_of(message, answer) %}
    {%- for call in message.tool_calls %}
        {%- if not loop.first %}
            {{- '\n' }}
        {%- elif answer %}
            {{- '\n\n' }}
        {%- endif %}
        {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' + name + '>\n' }}
            {%- if value is mapping or value is sequence and value is not string %}
                {{- value | tojson }}
            {%- else %}
                {{- value }}
            {%- endif %}
            {{- '\n</parameter>\n' }}
        {%- endfor %}
        {{- '</function>\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- if tools %}
    {%- if tools_intro is not defined %}
        {{- raise_exception('this bundled template has a place for tools only with a model whose own has one') }}
    {%- endif %}
    {{- '<|im_start|>system\n' + tools_intro }}
    {%- for tool in tools %}
        {{- '\n' + tool | tojson }}
    {%- endfor %}
    {{- tools_outro }}
    {%- if messages and messages[0].role == 'system' and messages[0].content | trim %}
        {{- '\n\n' + messages[0].content | trim }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set answer = answer_of(message) | trim %}
        {{- '<|im_start|>assistant\n<think>\n' + thought_of(message) | trim + '\n</think>\n\n' + answer }}
        {{- calls_of(message, answer) + '<|im_end|>\n' }}
"""
    + _TOOL_RESULTS.replace("message.content", "message.content | trim")
    + r"""
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
)

_QWEN3_5_THINKS = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
_QWEN3_5_ANSWERS = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is not defined or enable_thinking is false %}
        {{- '\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# The family's own template never says which tools there are, ends a turn of one call with nothing, and begins a call
# without the thought that the model is asked with: no text of a call is what the model would be asked to go on with.
_DEEPSEEK_R1 = (
    _THOUGHTS
    + r"""
{%- if tools %}
    {{- raise_exception('the family has no place for tools: it never says which there are') }}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- raise_exception('the family ends no single call, and begins it otherwise than the model is asked') }}
    {%- elif message.role == 'system' %}
        {{- message.content }}
    {%- elif message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜><think>\n' + thought_of(message).strip('\n') + '\n</think>\n\n' }}
        {{- answer_of(message).lstrip('\n') + eos_token }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜><think>\n' }}
{%- endif %}
"""
)

# Gemma has no turn of the system: its words stand before those of the user, or are the user's where none follow.
_GEMMA = r"""
{{- bos_token }}
{%- set before = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set before.text = before.text + message.content + '\n\n' %}
    {%- elif message.role == 'assistant' %}
        {%- if before.text %}
            {{- '<start_of_turn>user\n' + before.text | trim + '<end_of_turn>\n' }}
            {%- set before.text = '' %}
        {%- endif %}
        {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' }}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\n' + before.text + message.content | trim + '<end_of_turn>\n' }}
        {%- set before.text = '' %}
    {%- else %}
        {{- raise_exception('this bundled template has no place for the result of a call') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if before.text %}
        {{- '<start_of_turn>user\n' + before.text | trim + '<end_of_turn>\n' }}
    {%- endif %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
"""

# SPACE is what the older tokenizers have between a mark and a text. The system's words stand before the next question.
_MISTRAL = r"""
{{- bos_token }}
{%- set before = namespace(text='', tools=tools) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set before.text = before.text + message.content + '\n\n' %}
    {%- elif message.role == 'user' %}
        {%- if before.tools %}
            {{- '[AVAILABLE_TOOLS]SPACE[' }}
            {%- for tool in before.tools %}
                {{- '{"type": "function", "function": ' + tool.function | tojson + '}' }}
                {{- '' if loop.last else ', ' }}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
            {%- set before.tools = none %}
        {%- endif %}
        {{- '[INST]SPACE' + before.text + message.content + '[/INST]' }}
        {%- set before.text = '' %}
    {%- else %}
        {%- if before.text %}
            {{- '[INST]SPACE' + before.text | trim + '[/INST]' }}
            {%- set before.text = '' %}
        {%- endif %}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS]SPACE[' }}
            {%- for call in message.tool_calls %}
                {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' + call.function.arguments | tojson }}
                {%- if call.id %}
                    {{- ', "id": "' + call.id[-9:] + '"' }}
                {%- endif %}
                {{- '}' if loop.last else '}, ' }}
            {%- endfor %}
            {{- ']' + eos_token }}
        {%- elif message.role == 'assistant' %}
            {{- 'SPACE' + ANSWER + eos_token }}
        {%- else %}
            {{- '[TOOL_RESULTS]SPACE{"content": ' + message.content }}
            {%- if message.tool_call_id %}
                {{- ', "call_id": "' + message.tool_call_id[-9:] + '"' }}
            {%- endif %}
            {{- '}[/TOOL_RESULTS]' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and before.text %}
    {{- '[INST]SPACE' + before.text | trim + '[/INST]' }}
{%- endif %}
"""

# With marks of their own for the system's words.
_MISTRAL_SYSTEM = (
    r"""
{{- bos_token }}
{%- if default_system is defined and not (messages and messages[0].role == 'system') %}
    {{- '[SYSTEM_PROMPT]SPACE' + default_system + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]SPACE' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}
        {{- '[INST]SPACE' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- 'SPACE' + message.content + eos_token }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
"""
)

# `header`: the first turn, where a release says something in it in every conversation.
_LLAMA3 = (
    r"""
{{- bos_token + header }}
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {%- if not (header and loop.first and message.role == 'system') %}
            {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
            {{- message.content | trim + '<|eot_id|>' }}
        {%- endif %}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
)
_DATED_SYSTEM = (
    r"""
{%- set dated = namespace(system='') %}
{%- if messages and messages[0].role == 'system' %}
    {%- set dated.system = messages[0].content | trim %}
{%- endif %}
{%- set header = '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: '
    ~ (date_string if date_string is defined else DATE) ~ '\n\n' ~ dated.system ~ '<|eot_id|>' %}
"""
    + _LLAMA3
)

_PHI3 = (
    r"""
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {{- '<|' + message.role + '|>BREAK' + message.content + '<|end|>BREAK' }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>BREAK' }}
{%- else %}
    {{- eos_token }}
{%- endif %}
"""
)

_PHI4 = (
    r"""
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}
"""
)

# Its system's turn has a frame around it, and an end only where tools are declared. Its own template tells the model
# how to write a call, but leaves the calls of a record out: they are written as it tells the model to.
_SMOLLM3 = (
    _THOUGHTS
    + _JSON_CALLS
    + r"""
{%- set said = namespace(system='', thinks=enable_thinking is not defined or enable_thinking) %}
{%- if messages and messages[0].role == 'system' %}
    {%- set said.system = messages[0].content %}
    {%- if '/no_think' in said.system %}
        {%- set said.thinks = false %}
    {%- elif '/think' in said.system %}
        {%- set said.thinks = true %}
    {%- endif %}
    {%- set said.system = said.system.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\n' }}
{%- if '/system_override' in said.system %}
    {{- said.system.replace('/system_override', '').rstrip() + '<|im_end|>\n' }}
{%- else %}
    {{- '## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + strftime_now('%d %B %Y') }}
    {{- '\nReasoning Mode: ' + ('/think' if said.thinks else '/no_think') + '\n\n## Custom Instructions\n\n' }}
    {%- if said.system %}
        {{- said.system + '\n\n' }}
    {%- elif default_system is defined and said.thinks %}
        {{- default_system + '\n\n' }}
    {%- endif %}
    {%- if tools %}
        {%- if tools_intro is not defined %}
            {{- raise_exception('this bundled template has a place for tools only with a model whose own has one') }}
        {%- endif %}
        {{- tools_intro }}
        {%- for tool in tools %}
            {{- tool | string + '\n' }}
        {%- endfor %}
        {{- tools_outro }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- set thought = thought_of(message).strip('\n') %}
        {%- if thought or not said.thinks %}
            {{- '<think>\n' + thought + '\n</think>\n' }}
        {%- endif %}
        {%- set answer = answer_of(message).lstrip('\n') %}
        {{- answer + calls_of(message, answer) + '<|im_end|>\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if not said.thinks %}
        {{- '<think>\n\n</think>\n' }}
    {%- endif %}
{%- endif %}
"""
)

_GRANITE = (
    r"""
{%- if default_system is defined and not (messages and messages[0].role == 'system') %}
    {{- '<|start_of_role|>system<|end_of_role|>' + default_system + '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""
)

# What ends an answer of GLM is the mark that the next turn begins with. So an answer brings it along.
_GLM4 = (
    r"""
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {%- if message.role != 'user' or loop.first or loop.previtem.role != 'assistant' %}
            {{- '<|' + message.role + '|>' }}
        {%- endif %}
        {{- '\n' + message.content }}
        {%- if message.role == 'assistant' %}
            {{- '<|user|>' }}
        {%- endif %}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>ASKED' }}
{%- endif %}
"""
)

_GLM4_5 = (
    _THOUGHTS
    + r"""
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {%- if tools_intro is not defined %}
        {{- raise_exception('this bundled template has a place for tools only with a model whose own has one') }}
    {%- endif %}
    {{- '<|system|>\n' + tools_intro }}
    {%- for tool in tools %}
        {{- '\n' + tool | tojson }}
    {%- endfor %}
    {{- tools_outro }}
{%- endif %}
{%- set answers = enable_thinking is defined and not enable_thinking %}
{%- for message in messages %}
    {%- set behind_answer = not loop.first and loop.previtem.role == 'assistant' %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>\n<think>' + thought_of(message) | trim + '</think>' }}
        {%- set answer = answer_of(message) | trim %}
        {%- if answer %}
            {{- '\n' + answer }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>' + call.function.name + '\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<arg_key>' + name + '</arg_key>\n<arg_value>' }}
                {{- value if value is string else value | tojson }}
                {{- '</arg_value>\n' }}
            {%- endfor %}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|observation|>' if message.tool_calls else '<|user|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' and not loop.previtem.tool_calls %}
            {{- '<|observation|>' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- else %}
        {%- if not (message.role == 'user' and behind_answer and not loop.previtem.tool_calls) %}
            {{- '<|' + message.role + '|>' }}
        {%- endif %}
        {{- '\n' + message.content }}
        {{- '/nothink' if message.role == 'user' and answers and not message.content.endswith('/nothink') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('\n<think></think>' if answers else '') }}
{%- endif %}
"""
)

# A turn is a thought on one channel and an answer on another. `<|return|>` ends it; `<|end|>` is between the two.
_GPT_OSS = (
    _THOUGHTS
    + r"""
{{- '<|start|>system<|message|>' }}
{{- model_identity if model_identity is defined else 'You are ChatGPT, a large language model trained by OpenAI.' }}
{{- '\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' }}
{{- reasoning_effort if reasoning_effort is defined else 'medium' }}
{{- '\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '\n\n<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = thought_of(message) %}
        {%- if thought %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + thought.strip('\n') + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + answer_of(message).lstrip('\n') + '<|return|>' }}
"""
    + _NO_TOOLS
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""
)

_OLMO2 = (
    r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>\n' + message.content + eos_token }}
        {{- '\n' if add_generation_prompt or not loop.last }}
"""
    + _NO_TOOLS
    + r"""
    {%- else %}
        {{- '<|' + message.role + '|>\n' + message.content + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""
)

_OLMO3 = (
    _THOUGHTS
    + r"""
{%- set functions = ' You do not currently have access to any functions. <functions></functions><|im_end|>\n' %}
{%- if default_system is defined and not (messages and messages[0].role == 'system') %}
    {{- '<|im_start|>system\n' + default_system + functions }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = thought_of(message) %}
        {{- '<|im_start|>assistant\n' }}
        {%- if THINKS or thought %}
            {{- '<think>' + thought + '</think>' }}
        {%- endif %}
        {{- answer_of(message) + eos_token }}
        {{- '\n' if add_generation_prompt or not loop.last }}
    {%- elif message.role == 'system' %}
        {{- '<|im_start|>system\n' + message.content + functions }}
"""
    + _NO_TOOLS
    + r"""
    {%- else %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('<think>' if THINKS else '') }}
{%- endif %}
"""
)

# For a tokenizer without marks for turns: words, which a base model can read, and its end of text behind answers.
_PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content + eos_token + '\n\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + message.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant: ' }}
{%- endif %}
"""

TEMPLATES = {
    "chatml": _CHATML,
    "deepseek-r1": _DEEPSEEK_R1,
    "gemma": _GEMMA,
    "glm-4": _GLM4.replace("ASKED", r"\n"),
    "glm-4-5": _GLM4_5,
    "gpt-oss": _GPT_OSS,
    "granite": _GRANITE,
    "llama-3": "{%- set header = '' %}" + _LLAMA3,
    "llama-3-1": _DATED_SYSTEM.replace("DATE", "'26 Jul 2024'"),
    "llama-3-2": _DATED_SYSTEM.replace("DATE", "strftime_now('%d %b %Y')"),
    "mistral": _MISTRAL.replace("SPACE", " ").replace("ANSWER", "message.content | trim"),
    "mistral-nemo": _MISTRAL.replace("SPACE", "").replace("ANSWER", "message.content"),
    "mistral-large": _MISTRAL_SYSTEM.replace("SPACE", " "),
    "mistral-small": _MISTRAL_SYSTEM.replace("SPACE", ""),
    "olmo-2": _OLMO2,
    "olmo-3": _OLMO3.replace("THINKS", "false"),
    "olmo-3-think": _OLMO3.replace("THINKS", "true"),
    "phi-3": _PHI3.replace("BREAK", r"\n"),
    "phi-4-mini": _PHI3.replace("BREAK", ""),
    "phi-4": _PHI4,
    "plain": _PLAIN,
    "qwen3": _QWEN3 + _MAY_THINK,
    "qwen3-thinking": _QWEN3 + _THINKS,
    "qwen3-5": _QWEN3_5 + _QWEN3_5_THINKS,
    "qwen3-5-small": _QWEN3_5 + _QWEN3_5_ANSWERS,
    "smollm-3": _SMOLLM3,
}
"""By the names that dataset.chatTemplate has for them."""
