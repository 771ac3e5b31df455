"""fcos_R_50_FPN_1x with both IoU-balanced losses, w_loc measured."""

from .fcos_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.iou_balanced.cls_eta = 1.5
model.iou_balanced.loc_lambda = 1.5
