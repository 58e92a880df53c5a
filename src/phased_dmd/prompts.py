"""Prompts: one a line, from a file or a shipped set; a repeated line is drawn as often as it stands there."""

from pathlib import Path

from phased_dmd.config import UserError

SHIPPED = Path(__file__).parent / "assets" / "prompts"


def read_prompts(source: str) -> list[str]:
    """The prompts of a shipped set's name or of a text file; blank lines and lines that begin with # are left out."""
    shipped = SHIPPED / f"{source}.txt"
    path = shipped if "/" not in source and shipped.exists() else Path(source)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.txt")))
        raise UserError(f"prompts: {source} is neither a readable text file nor a shipped set ({known})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompts: {source} holds no prompt")
    return prompts
