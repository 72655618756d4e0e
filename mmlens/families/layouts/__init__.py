"""How each processor lays an image out as tokens: one module per way of laying out.

A layout is `layout(processor, inputs, sizes) -> list[ImageGrid]`: `inputs` are what the processor returned,
`sizes` the original (width, height) of every image of the batch, batch-major. Every step between the original
image and a patch (resize, pad, crop, tile) is linear in x and in y apart, so a layout only has to say which
interval of the original each grid column and each grid row shows.
"""
