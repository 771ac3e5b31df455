"""The paper's equations once more, in float64 NumPy and element by element: the tests' oracle."""

import numpy as np


def sigmoid_ce(x, target):
    """-log of the probability given to ``target`` (0 or 1)."""
    z = -x if target == 1 else x
    return max(z, 0.0) + np.log1p(np.exp(-abs(z)))


def focal(x, target, alpha, gamma):
    """Focal loss of one logit; a negative alpha weighs neither target."""
    positive, negative = (alpha, 1.0 - alpha) if alpha >= 0 else (1.0, 1.0)
    if target == 1:
        return positive * sigmoid_ce(x, 1) * np.exp(-gamma * sigmoid_ce(x, 0))
    return negative * sigmoid_ce(x, 0) * np.exp(-gamma * sigmoid_ce(x, 1))


def cls_weights(iou, ce, eta, group=None):
    """Eq. 2, group by group; 1 where the denominator is 0."""
    group = [0] * len(iou) if group is None else list(group)
    weights = np.ones(len(iou))
    for g in set(group):
        members = [i for i in range(len(iou)) if group[i] == g]
        denominator = sum(float(iou[i]) ** eta * float(ce[i]) for i in members)
        if denominator > 0:
            numerator = sum(float(ce[i]) for i in members)
            for i in members:
                weights[i] = float(iou[i]) ** eta * numerator / denominator
    return weights


def focal_sum(logits, labels, alpha=0.25, gamma=2.0, weights=None):
    """Eq. 1: sum over all (anchor, class) entries; ``weights`` in the order of the positives."""
    num_classes = logits.shape[1]
    total, seen = 0.0, 0
    for row, label in zip(logits, labels, strict=True):
        if label == -1:
            continue
        for c in range(num_classes):
            if c == label:
                total += (1.0 if weights is None else weights[seen]) * focal(
                    row[c], 1, alpha, gamma
                )
                seen += 1
            else:
                total += focal(row[c], 0, alpha, gamma)
    return total


def quality_focal(x, target):
    """Quality focal loss of one logit, arXiv 2006.04388 eq. 6 with beta 2; target in [0, 1]."""
    p = np.exp(-sigmoid_ce(x, 1))
    return (target - p) ** 2 * (target * sigmoid_ce(x, 1) + (1 - target) * sigmoid_ce(x, 0))


def varifocal(x, target):
    """Varifocal loss of one logit, arXiv 2008.13367 eq. 2 with alpha 0.75 and gamma 2."""
    if target > 0:
        return target * (target * sigmoid_ce(x, 1) + (1 - target) * sigmoid_ce(x, 0))
    return 0.75 * np.exp(-sigmoid_ce(x, 1)) ** 2 * sigmoid_ce(x, 0)


SOFT_TARGETS = {"quality_focal": quality_focal, "varifocal": varifocal}


def soft_target_sum(name, logits, labels, iou):
    """A rival's sum over all (anchor, class) entries; ``iou`` in the order of the positives."""
    total, seen = 0.0, 0
    for row, label in zip(logits, labels, strict=True):
        if label == -1:
            continue
        target = np.zeros(logits.shape[1])
        if label < logits.shape[1]:
            target[label] = iou[seen]
            seen += 1
        total += sum(SOFT_TARGETS[name](x, t) for x, t in zip(row, target, strict=True))
    return total


def positive_ce(logits, labels, alpha=0.25, gamma=2.0):
    """CE_i: the focal term of each positive's own class."""
    num_classes = logits.shape[1]
    return np.array(
        [
            focal(row[label], 1, alpha, gamma)
            for row, label in zip(logits, labels, strict=True)
            if 0 <= label < num_classes
        ]
    )


def smooth_l1(d, beta):
    """Smooth L1 of one difference."""
    d = abs(d)
    return 0.5 * d * d / beta if d < beta else d - 0.5 * beta


def loc_loss(pred, target, beta):
    """Smooth L1 summed over the four coordinates, (P,)."""
    return np.array(
        [
            sum(smooth_l1(a - b, beta) for a, b in zip(p, t, strict=True))
            for p, t in zip(pred, target, strict=True)
        ]
    )


def decode(deltas, anchor):
    """One box (XYXY) from its deltas (dx, dy, dw, dh), |dw| and |dh| clamped at ln(1000/16)."""
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2 + deltas[0] * w, (anchor[1] + anchor[3]) / 2 + deltas[1] * h
    clamp = np.log(1000.0 / 16)
    w, h = w * np.exp(min(deltas[2], clamp)), h * np.exp(min(deltas[3], clamp))
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def encode(box, anchor):
    """The deltas of one box."""
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    bw, bh = box[2] - box[0], box[3] - box[1]
    return np.array(
        [
            ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / w,
            ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / h,
            np.log(bw / w),
            np.log(bh / h),
        ]
    )


def box_iou(a, b):
    """IoU of two boxes."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def detector_losses(
    anchors,
    logits,
    labels,
    deltas,
    gt,
    *,
    eta,
    lambda_,
    w_loc,
    normalizer,
    beta=0.11,
    scope="batch",
):
    """Both losses of a batch.

    Arrays (L)(R_l, 4), (L)(N, R_l, K), (N, R), (L)(N, R_l, 4), (N, R, 4).

    ``w_loc`` None measures it on this batch.
    """
    flat = np.concatenate(anchors)
    level_of = np.concatenate([[i] * len(a) for i, a in enumerate(anchors)])
    x, d = np.concatenate(logits, axis=1), np.concatenate(deltas, axis=1)
    num_images, num_anchors, num_classes = x.shape
    iou, ce, loc, level, image = [], [], [], [], []
    for n in range(num_images):
        for r in range(num_anchors):
            if 0 <= labels[n, r] < num_classes:
                iou.append(box_iou(decode(d[n, r], flat[r]), gt[n, r]))
                ce.append(focal(x[n, r, labels[n, r]], 1, 0.25, 2.0))
                loc.append(loc_loss([d[n, r]], [encode(gt[n, r], flat[r])], beta)[0])
                level.append(level_of[r])
                image.append(n)
    iou, ce, loc = np.array(iou), np.array(ce), np.array(loc)
    group = {"batch": None, "level": level, "image": image}[scope]
    weights = cls_weights(iou, ce, eta, group)
    cls = focal_sum(x.reshape(-1, num_classes), labels.reshape(-1), weights=weights)
    if w_loc is None:
        w_loc = loc.sum() / (iou**lambda_ * loc).sum()
    box = (w_loc * iou**lambda_ * loc).sum()
    return cls / normalizer, box / normalizer, iou, w_loc
