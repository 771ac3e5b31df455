"""The baseline: detectron2's FCOS-R50, 1x schedule, plain losses, as in the YAML config."""

from detectron2.config import LazyCall as L

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.model_zoo import get_detectron2_config
from iou_balanced_d2.projects.fcos import IoUBalancedFCOS

_base = get_detectron2_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, lr_multiplier = _base.dataloader, _base.lr_multiplier
optimizer, train = _base.optimizer, _base.train

model = _base.model
model._target_ = IoUBalancedFCOS
# The keys of MODEL.IOU_BALANCED, in lower case. Boxes start at IoU 0: any w_loc measured early is
# too large later on.
model.iou_balanced = L(LossOptions)(cls_eta=0.0, loc_lambda=0.0, loc_weight_rule="running")
