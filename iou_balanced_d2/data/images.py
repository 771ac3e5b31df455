"""Image files as detectron2 reads them: turned as their EXIF data say, in 8 bit."""

from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
_ORIENTATION, _TURNED = 0x0112, {5, 6, 7, 8}  # EXIF's tag, and its values that swap the sides


def _orientation(image: Image.Image) -> int:
    """By the EXIF data; broken ones are none, as for detectron2."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # PIL raises SyntaxError and others
        return 1


def is_turned(image: Image.Image) -> bool:
    """Whether an image's EXIF data turn it by 90 degrees."""
    return _orientation(image) in _TURNED


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image, just opened, as it is shown."""
    width, height = image.size
    # (PIL has turned TIFF files itself.)
    return (height, width) if is_turned(image) and image.format != "TIFF" else (width, height)


def fault_of(image: Image.Image) -> str:
    """What detectron2 would misread in an image just opened (decoding loses a TIFF's EXIF data).

    "not 8 bit": the pixels become nearly black or white; "turned TIFF": PIL and detectron2 both
    turn it; else an empty text.
    """
    if image.mode[0] in "IF":  # PIL's modes of more than 8 bit: I;16, I, F
        return "not 8 bit"
    is_right = image.format != "TIFF" or _orientation(image) == 1
    return "" if is_right else "turned TIFF"
