"""The sizes in pixels that pictures are trained in."""

import math


def bucket_size(width: int, height: int, resolution: int, step: int = 64, keep_aspect: bool = True) -> tuple[int, int]:
    """The (width, height) in pixels that a picture is resized and cropped to.

    Among sizes whose sides are multiples of `step` and whose area does not exceed `resolution` squared (a small
    tolerance aside), the one with the nearest aspect ratio; of equal ones the largest.
    """
    side = max(step, resolution // step * step)
    if not keep_aspect:
        return side, side
    area = max(resolution * resolution, step * step)
    aspect = width / height
    best = (side, side)
    best_error = abs(_log_ratio(1.0, aspect))
    for length in range(step, 4 * side + 1, step):
        fitting = int(area / length)
        for across in {max(step, fitting // step * step), max(step, -(-fitting // step) * step)}:
            if length * across > area * 1.02 or across > 4 * side:
                continue
            # both ways, so that a turned picture gets the turned size
            for wide, tall in ((length, across), (across, length)):
                error = abs(_log_ratio(wide / tall, aspect))
                nearer, equal = error < best_error - 1e-9, error < best_error + 1e-9
                if nearer or (equal and wide * tall > best[0] * best[1]):
                    best, best_error = (wide, tall), error
    return best


def _log_ratio(first: float, second: float) -> float:
    return math.log(first / second)
