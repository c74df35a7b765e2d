// Windows the other way round, for gradients. window.wgsl stands before this.

// The position of all images, counted through, that sees a pixel of all images by a tap; ~0 if none does.
fn position_of(pixel: u32, tap_line: u32, tap_column: u32) -> u32 {
    let row = pixel / params.image_columns;
    let image = row / params.image_lines;
    // Unsigned: what is before the first window is past the last one.
    let line = row % params.image_lines + params.before_lines - tap_line;
    let column = pixel % params.image_columns + params.before_columns - tap_column;
    if line >= params.position_lines * params.stride_lines || line % params.stride_lines != 0u {
        return ~0u;
    }
    if column >= params.position_columns * params.stride_columns || column % params.stride_columns != 0u {
        return ~0u;
    }
    let position = vec2(line / params.stride_lines, column / params.stride_columns);
    return (image * params.position_lines + position.x) * params.position_columns + position.y;
}
