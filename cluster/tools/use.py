"""What a request's tools mean for its prompt, its sampling and its answer."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headrace.cluster.tools.calls import CallReader, Said, read_template
from headrace.cluster.tools.formats import BARE, Format, grammar, known_format, known_template
from headrace.cluster.tools.models import NamedTool, Tool, ToolChoice
from headrace.scheduler.errors import RequestError
from headrace.scheduler.request import SamplingParams
from headrace.scheduler.structured import StructuredOutputsParams

_ANCHOR = 256
"""Characters of the prompt in which the mark lies after which an answer begins."""


class Asked(Protocol):
    """The part of a request that is about tools."""

    @property
    def tools(self) -> list[Tool] | None: ...

    @property
    def tool_choice(self) -> ToolChoice | None: ...

    @property
    def parallel_tool_calls(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How a model is told of tools, and how its calls are read.

    `told` is what its chat template gets. With a `grammar`, it cannot but call one of them. Of an answer
    that is to have a `single` call, others are left out.
    """

    told: list[dict[str, Any]]
    template: dict[str, Any]
    form: Format | None
    grammar: str | None
    shows_special: bool
    single: bool = False
    prefix: str = ""

    def sampling(self, params: SamplingParams) -> SamplingParams:
        """RequestError when the answer is to have another form, too."""
        if params.structured_outputs is not None:
            param = params.structured_outputs.param
            told = f'{param} and tools exclude each other; "tool_choice": "none" has no calls'
            raise RequestError(told, param)
        if self.shows_special:  # or marks of calls would not be seen
            params = replace(params, skip_special_tokens=False)
        if self.grammar is None:
            return params
        form = StructuredOutputsParams(grammar=self.grammar, param="tools")
        return replace(params, structured_outputs=form)

    def after(self, prompt: Sequence[int], tokenizer: Any) -> "ToolUse":
        """The same, for answers to `prompt`: a tokenizer's own template may have to see its end.

        RequestError where no template can be read."""
        loaded = read_template(self.template)
        if self.template.get("start_anchor") == "\0":
            return self  # ours
        text = tokenizer.decode(list(prompt))
        anchor = loaded.truncate_past_last_anchor(text)
        return replace(self, prefix=text[: len(text) - len(anchor)][-_ANCHOR:] + anchor)

    def reader(self, name: str) -> CallReader:
        """Of one answer; `name` makes the ids of its calls unique."""
        return CallReader(
            self.template,
            self.form,
            prefix=self.prefix,
            tools=self.told,
            name=name,
            most=1 if self.single else None,
        )

    def read(self, text: str, name: str) -> Said:
        """A whole answer."""
        reader = self.reader(name)
        said = reader.feed(text)
        said.add(reader.finish())
        return said


def tool_use(asked: Asked, tokenizer: Any) -> ToolUse | None:
    """None when there are no tools, or none may be called. RequestError for what cannot be had of them
    with this model."""
    choice = asked.tool_choice
    if asked.tools is None:
        if choice is not None or asked.parallel_tool_calls is not None:
            name = "parallel_tool_calls" if choice is None else "tool_choice"
            raise RequestError(f"{name} needs tools", name)
        return None
    names = [tool.function.name for tool in asked.tools]
    if len({*names}) < len(names):
        raise RequestError("two of the tools have the same name", "tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        name = choice.function.name[:64]
        raise RequestError(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    if choice == "none":
        return None
    told = for_template(asked.tools)
    shown = chat_template_with(tokenizer, told)
    if choice is None or choice == "auto":
        use = _free(told, shown, tokenizer)
        return replace(use, single=asked.parallel_tool_calls is False)
    functions, parallel = [tool.function for tool in asked.tools], asked.parallel_tool_calls
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each.name == choice.function.name]
        parallel = False
    form, special = known_format(shown) or BARE, _special(tokenizer)
    text = grammar(form, functions, special, parallel=parallel is not False)
    return ToolUse(told, form.template, form, text, _shows(form.template, special))


def _free(told: list[dict[str, Any]], shown: str, tokenizer: Any) -> ToolUse:
    """Of a model that may call or not."""
    form = None
    template = getattr(tokenizer, "response_template", None) or known_template(shown)
    if template is None:
        form = known_format(shown)
        if form is None:
            raise RequestError(
                "how this model writes its calls is not known here, so that they could not be told from"
                ' text: give "tool_choice" "required" or a function',
                "tool_choice",
            )
        template = form.template
    return ToolUse(told, template, form, None, _shows(template, _special(tokenizer)))


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As chat templates read them, which may go through the parameters."""
    told = [tool.model_dump(exclude_none=True) for tool in tools]
    for tool in told:
        tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
    return told


def chat_template_with(tokenizer: Any, told: Sequence[dict[str, Any]]) -> str:
    """The chat template that is used with tools. RequestError when it has no place for them."""
    try:
        shown = tokenizer.get_chat_template(None, list(told))
    except ValueError as error:
        raise RequestError(f"the model has no chat template, which tools need: {error}") from error
    if not re.search(r"\btools\b", shown):
        raise RequestError("the model's chat template has no place for tools", "tools")
    return str(shown)


def _special(tokenizer: Any) -> dict[str, int]:
    """Tokens that decoding leaves out, and that no text becomes."""
    return {
        token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def _shows(template: dict[str, Any], special: dict[str, int]) -> bool:
    text = json.dumps(template).replace("\\\\", "")  # as in patterns
    return any(token in text for token in special)
