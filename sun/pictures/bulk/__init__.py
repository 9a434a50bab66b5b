"""Any number of pictures from a file of prompts, drawn by any number of processes that share a folder.

``rows`` one row as a recipe | ``prompts_file`` the file, by offsets | ``claims`` who draws what | ``outputs`` folder or
shards | ``batches`` which rows are drawn together, and drawing them | ``run`` the run: its folder, its loop.
"""
