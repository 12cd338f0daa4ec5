"""What pair labels are refused because they could be read both ways, whichever library holds them.

It imports no array library, so that every part of nearfar refuses them in the same words.
"""


def check_choice(similar_label: object) -> None:
    """Refuse what is neither 0, 1 nor None."""
    if isinstance(similar_label, bool) or similar_label not in (0, 1, None):
        raise ValueError(f"similar_label must be 0, 1 or None, got {similar_label!r}.")


def of_text(name: str) -> TypeError:
    """The error for labels that are text."""
    return TypeError(
        f"{name} holds text. Say which text means similar: pass np.asarray({name}) == 'same', "
        "with your own word in place of 'same'."
    )


def check_meaning(name: str, dtype: object, similar_label: object) -> None:
    """Refuse labels whose meaning is not said, or said twice.

    Args:
        name: the caller's name for the labels.
        dtype: "bool", or the dtype of numbers, which the error shows.
        similar_label: 0, 1 or None.
    """
    if dtype == "bool":
        if similar_label == 0:
            raise ValueError(
                f"{name} is bool, where True always means similar, but similar_label=0 says the "
                f"opposite. Drop similar_label, or pass ~{name} if True means different."
            )
    elif similar_label is None:
        raise TypeError(
            f"{name} holds numbers ({dtype}), and the literature reads 0 and 1 both ways. "
            f"Say which means similar: similar_label=1 if 1 marks similar pairs, similar_label=0 "
            f"if 0 does; or pass bool, True = similar ({name} == 1 or {name} == 0)."
        )
