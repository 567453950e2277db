"""The parameters that OpenAI, vLLM or SGLang have and this mesh has not.

Each is refused by name, unless its value asks for nothing: null, or one of the values that stand beside it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SHARED: Final[Mapping[str, tuple[Any, ...]]] = {
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "priority": (0,),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
}

CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **_SHARED,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    # How reasoning is told apart, which routers for SGLang and vLLM add to every request; here it is never told apart.
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "include_reasoning": (True,),
}

COMPLETION: Final[Mapping[str, tuple[Any, ...]]] = {
    **_SHARED,
    "echo": (False,),
    "suffix": ("",),
}

MESSAGE: Final[Mapping[str, tuple[Any, ...]]] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
"""An answer that is sent back as history has these keys, all without a value."""

STRUCTURED_OUTPUTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "json_object": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_additional_properties": (False,),
    # How another engine goes about it; JSON is written in one way here, without any white space of choice.
    "disable_fallback": (True, False),
    "disable_any_whitespace": (True, False),
}

STREAM_OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}
