"""How updates reach the disk: merged, in batches, and acknowledged once committed."""
