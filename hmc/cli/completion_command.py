"""`hmc completion`: the script by which a shell completes `hmc`."""

from __future__ import annotations

import click

from hmc.cli.completion import script


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes commands, options, plans, machines and kernels in a shell.

    \b
    eval "$(hmc completion bash)"                        in ~/.bashrc
    eval "$(hmc completion zsh)"                         in ~/.zshrc
    hmc completion fish > ~/.config/fish/completions/hmc.fish
    """
    click.echo(script(shell))
