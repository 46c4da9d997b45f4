"""Models as an export leaves them, without a run around them."""

from ppcl.surgery.plugboard import Plugboard


def cut(family, model, intervals):
    """Without the removed blocks and with what an export's config says; the model itself stays whole."""
    board = Plugboard(family, model, intervals).remove()
    found = board.standalone()
    removed = {stack: [list(pair) for pair in pairs] for stack, pairs in intervals.items()}
    found.register_to_config(ppcl={"kept_layers": board.kept, "removed_intervals": removed})
    board()
    return found
