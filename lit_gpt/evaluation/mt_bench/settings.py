"""What can be said when MT-bench's answers are judged and the judgments shown: the flags of the two scripts.

Imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MtBenchJudgmentFlags:
    """Flags of the judgments of MT-bench's answers."""

    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    judge_file: str = "data/judge_prompts.jsonl"
    """The judge's prompts."""
    judge_model: str = "gpt-4"
    """Who judges: claude-... by Anthropic's API, any other by OpenAI's or a compatible server's."""
    reference_file: str | None = None
    """Right answers to math, reasoning and coding; by default data/BENCH/reference_answer/JUDGE.jsonl."""
    baseline_model: str = "gpt-3.5-turbo"
    """Whom pairwise-baseline compares with."""
    mode: str = "single"
    """single (rate each answer), pairwise-baseline or pairwise-all (compare two, in both orders)."""
    model_list: list[str] | None = None
    """Models to judge, by the names of their answer files; by default all that there are."""
    turns: str = "auto"
    """first, both (published), or auto: second turns of models that answered any."""
    parallel: int = 1
    """Requests at once."""
    first_n: int | None = None
    """Judge only the first so many questions."""
    max_tokens: int = 2048
    """Tokens of a judgment; a judge that thinks before it writes needs more."""
    published_claude: bool = False
    """Ask a claude-... judge as published: at most 1024 tokens, and a pair's instruction within the user's message."""
    existing: str | None = None
    """What to do with a judgment file that is there: continue it, refuse, or overwrite it (all models in it); by default
    one made with the same settings is continued."""
    dry_run: bool = False
    """Say what would be sent, and stop."""
    yes: bool = False
    """Do not ask at a terminal."""


@dataclass
class MtBenchResultFlags:
    """Flags of the tables of MT-bench's judgments."""

    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    judge_model: str = "gpt-4"
    """Who judged."""
    input_file: str | None = None
    """The judgments; by default data/BENCH/model_judgment/JUDGE_single.jsonl, or _pair.jsonl."""
    mode: str = "single"
    """single, pairwise-baseline or pairwise-all."""
    baseline_model: str = "gpt-3.5-turbo"
    """Whom pairwise-baseline compares with."""
    model_list: list[str] | None = None
    """Show only these models."""
    radar: str | None = None
    """Where the picture of ratings by category goes, FILE.png; by default data/BENCH/radar.png; off draws none."""
