// What programs over the windows of images share. An image is a run of rows, one for each pixel, line by line, whose
// columns are channels. A window is what an output position sees: KERNEL_LINES x KERNEL_COLUMNS pixels, which are its
// taps. It may reach beyond the image.

override KERNEL_LINES: u32 = 3u;
override KERNEL_COLUMNS: u32 = 3u;

// src/kernels/window.rs has the same.
struct Params {
    // Threads that have something to do.
    threads: u32,
    channels: u32,
    image_lines: u32,
    image_columns: u32,
    // From one window to the next.
    stride_lines: u32,
    stride_columns: u32,
    // What the first window has before the image.
    before_lines: u32,
    before_columns: u32,
    // Windows.
    position_lines: u32,
    position_columns: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

// The pixel of all images, counted through, that a tap of a position of all images sees; ~0 outside of the image.
// Unsigned: what lies before the image is past its end.
fn pixel_of(position: u32, tap_line: u32, tap_column: u32) -> u32 {
    let row = position / params.position_columns;
    let image = row / params.position_lines;
    let line = row % params.position_lines * params.stride_lines + tap_line - params.before_lines;
    let column = position % params.position_columns * params.stride_columns + tap_column - params.before_columns;
    if line >= params.image_lines || column >= params.image_columns {
        return ~0u;
    }
    return (image * params.image_lines + line) * params.image_columns + column;
}
