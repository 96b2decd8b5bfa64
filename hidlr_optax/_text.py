"""Text in columns."""


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines of equally wide columns, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
