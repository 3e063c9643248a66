"""``igpt completion``: what makes a shell complete commands, options and their values at Tab."""

from __future__ import annotations

from typing import Literal

from tyro.conf import Positional

from igpt_fast.cli.commands import COMMANDS, load
from igpt_fast.cli.signature import options_of

_BASH = """\
_igpt() {{
    local command=${{COMP_WORDS[1]}} before=${{COMP_WORDS[COMP_CWORD-1]}} now=${{COMP_WORDS[COMP_CWORD]}} words=
    if (( COMP_CWORD == 1 )); then
        words="{commands} help"
    else
        case "$command $before" in
            "help help") words="{commands}" ;;
{values}
        esac
        [[ -n $words || $now != -* ]] || case "$command" in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$now"))
}}
complete -o default -F _igpt igpt
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def completion(shell: Positional[Literal["bash", "zsh"]]) -> None:
    """Print what makes a shell complete commands, options and their values at Tab.

    Example: source <(igpt completion bash)

    That line in ~/.bashrc makes it last; in ~/.zshrc with zsh.

    Args:
        shell: bash or zsh.
    """
    options, values = [], []
    for name in COMMANDS:
        own = list(options_of(load(name)))
        words = " ".join(word for option in own for word in (option.switch or option.names))
        options.append(f'            {name}) words="{words} --help" ;;')
        for option in own:
            if option.choices:
                before = "|".join(f'"{name} {word}"' for word in option.names or (name,))
                values.append(f'            {before}) words="{" ".join(option.choices)}" ;;')
    script = _BASH.format(commands=" ".join(COMMANDS), values="\n".join(values), options="\n".join(options))
    print((_ZSH if shell == "zsh" else "") + script, end="")
