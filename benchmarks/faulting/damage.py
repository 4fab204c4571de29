"""Bytes that are not what they were."""


def damaged(data, draw):
    """Some bits turned over, a piece cut off the end, or a piece zeroed."""
    how = draw.choice(["bits", "bits", "cut", "zeros"])
    if how == "cut":
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    if how == "zeros":
        start = draw.randrange(len(data))
        length = min(draw.randint(1, 4096), len(data) - start)
        changed[start : start + length] = bytes(length)
    else:
        for _ in range(draw.choice([1, 1, 8])):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)
