"""What trained detectors do, from their detections: comparison of runs, scores against IoU."""
