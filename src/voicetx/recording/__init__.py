"""An update on its way to the disk, together with those that came in beside it."""
