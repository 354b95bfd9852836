"""Rows of a data set: checked; in memory, in blocks, in Dask's tasks, in several processes; on a device."""
