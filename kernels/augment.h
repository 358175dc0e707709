// Random distortions of pictures: what is drawn for each, where a pixel comes from, its colour.
//
// The parameters are computed in float64, so that another device's sines change nothing, and are
// then rounded to what pixels are computed in: R, float32, or float64 for pictures in float64.
#pragma once
#include "philox.h"

// What is drawn for a picture, in this order, as in PARAMETERS of augment.py.
enum Parameter {
    HORIZONTAL_FLIP, VERTICAL_FLIP, ROTATION, SHEAR_X, SHEAR_Y, SCALE, TRANSLATION_X,
    TRANSLATION_Y, CROP_AREA, CROP_RATIO, CROP_X, CROP_Y, BRIGHTNESS, CONTRAST, SATURATION,
    N_PARAMETERS
};
const int QUADS = 4;   // of random words, for the parameters; behind them, one a node of the field
const int FINEST = 4;  // least distance of two nodes, in pixels
const int TAPS = 4;    // nodes along an axis that move a pixel; pixels that it is made of
enum Mode { ZEROS, BORDER, REFLECTION };

// A parameter is least + extent u, with u in [0, 1).
struct Range {
    double least, extent;
};

// What is the same for all pictures.
struct Settings {
    Range ranges[N_PARAMETERS];
    double fill, grey, bound;   // grey and bound are colours
    double divisor;             // of what is written
    double amplitude, density;  // of the displacements: in pixels, and nodes a pixel
    int mode, clamps, recolours[3], n_node_columns;
};

// Of all pictures; strides in elements.
struct Extent {
    long long n_channels;
    int in_height, in_width, out_height, out_width;
};
struct Strides {
    long long picture, channel, row, column;
};

// A uniform number of 24 random bits.
__device__ inline double uniform(unsigned bits) { return (bits >> 8) * 0x1p-24; }

__device__ inline uint4 random_words(unsigned long long seed, unsigned picture, unsigned quad) {
    return philox(seed, (unsigned long long)picture << 32 | quad);
}

// All parameters of a picture, with sine and cosine of the angles, which are given in half turns.
struct Drawn {
    double value[N_PARAMETERS], sine[N_PARAMETERS], cosine[N_PARAMETERS];
};

__device__ inline void draw_parameter(unsigned long long seed, unsigned picture, int i,
                                      const Settings& settings, Drawn& drawn) {
    double u = uniform(word(random_words(seed, picture, i / 4), i % 4));
    double value = settings.ranges[i].least + settings.ranges[i].extent * u;
    drawn.value[i] = value;
    sincospi(value, &drawn.sine[i], &drawn.cosine[i]);
}

// An output pixel x, y, counted from the middle, comes from a x + b y + c, d x + e y + f.
template <typename R>
struct Picture {
    R a, b, c, d, e, f, brightness, contrast, saturation;
};

// The part of the input that is shown: its size, and where its first pixel is.
struct Crop {
    double width, height, left, top;
};

__device__ inline Crop crop_of(const Drawn& drawn, const Extent& extent) {
    Crop crop{double(extent.in_width), double(extent.in_height), 0, 0};
    if (drawn.value[CROP_AREA] > 0) {
        double side = sqrt(drawn.value[CROP_AREA] * crop.width * crop.height);
        double stretch = exp(drawn.value[CROP_RATIO] / 2);
        crop.width = fmin(side * stretch, crop.width);
        crop.height = fmin(side / stretch, crop.height);
    }
    crop.left = drawn.value[CROP_X] * (extent.in_width - crop.width);
    crop.top = drawn.value[CROP_Y] * (extent.in_height - crop.height);
    return crop;
}

// The way back: translation, rotation and scale, shear along y, along x, flips, crop.
template <typename R>
__device__ inline Picture<R> picture_of(const Drawn& drawn, const Extent& extent) {
    double sine = drawn.sine[ROTATION], cosine = drawn.cosine[ROTATION];
    double shear_x = drawn.sine[SHEAR_X] / drawn.cosine[SHEAR_X];
    double shear_y = drawn.sine[SHEAR_Y] / drawn.cosine[SHEAR_Y];
    Crop crop = crop_of(drawn, extent);
    double by_x = crop.width / extent.out_width / drawn.value[SCALE];
    double by_y = crop.height / extent.out_height / drawn.value[SCALE];
    if (drawn.value[HORIZONTAL_FLIP] < 0) by_x = -by_x;
    if (drawn.value[VERTICAL_FLIP] < 0) by_y = -by_y;
    double below_x = sine - shear_y * cosine, below_y = cosine + shear_y * sine;
    double a = by_x * (cosine - shear_x * below_x), b = by_x * (-sine - shear_x * below_y);
    double d = by_y * below_x, e = by_y * below_y;
    double x = drawn.value[TRANSLATION_X] * extent.out_width;
    double y = drawn.value[TRANSLATION_Y] * extent.out_height;
    double c = crop.left + (crop.width - 1) / 2 - (a * x + b * y);
    double f = crop.top + (crop.height - 1) / 2 - (d * x + e * y);
    return {R(a), R(b), R(c), R(d), R(e), R(f), R(drawn.value[BRIGHTNESS]),
            R(drawn.value[CONTRAST]), R(drawn.value[SATURATION])};
}

template <typename R>
struct Vector2 {
    R x, y;
};

// What the threads of a block have in common: a picture, and the nodes around their pixels.
template <typename R, int TILE_WIDTH, int TILE_HEIGHT>
struct Scene {
    static const int COLUMNS = TILE_WIDTH / FINEST + TAPS, ROWS = TILE_HEIGHT / FINEST + TAPS;
    Drawn drawn;
    Picture<R> picture;
    Vector2<R> nodes[ROWS][COLUMNS];
};

// The pixels of a block, of some channels of a picture.
struct Tile {
    long long picture, channel;
    int top, left, height, width;
};

// This block's tile, of the pictures from ``first`` on.
template <int CHANNELS, int TILE_WIDTH, int TILE_HEIGHT>
__device__ inline Tile tile_of(const Extent& extent, long long first) {
    int across = (extent.out_width + TILE_WIDTH - 1) / TILE_WIDTH;
    int down = (extent.out_height + TILE_HEIGHT - 1) / TILE_HEIGHT;
    int groups = int(extent.n_channels / CHANNELS);
    unsigned rest = blockIdx.x / across, group = rest / down;
    int left = int(blockIdx.x - rest * across) * TILE_WIDTH;
    int top = int(rest - group * down) * TILE_HEIGHT;
    return {first + group / groups, (long long)(group % groups) * CHANNELS, top, left,
            min(TILE_HEIGHT, extent.out_height - top), min(TILE_WIDTH, extent.out_width - left)};
}

// The node at or before a pixel, and how far behind it the pixel is, in distances of nodes.
template <typename R>
__device__ inline int node_of(int pixel, R density, R& behind) {
    R at = pixel * density, node = floor(at);
    behind = at - node;
    return int(node);
}

// Fills the scene; every thread of the block must call.
template <typename R, int TILE_WIDTH, int TILE_HEIGHT>
__device__ inline void set_scene(Scene<R, TILE_WIDTH, TILE_HEIGHT>& scene, const Tile& tile,
                                 unsigned long long seed, const Settings& settings,
                                 const Extent& extent) {
    using Nodes = Scene<R, TILE_WIDTH, TILE_HEIGHT>;
    unsigned picture = unsigned(tile.picture);
    if (threadIdx.x < N_PARAMETERS)
        draw_parameter(seed, picture, threadIdx.x, settings, scene.drawn);
    if (settings.amplitude != 0) {
        R density = R(settings.density), amplitude = R(settings.amplitude), behind;
        int first_row = node_of(tile.top, density, behind);
        int first_column = node_of(tile.left, density, behind);
        for (int i = threadIdx.x; i < Nodes::ROWS * Nodes::COLUMNS; i += blockDim.x) {
            int row = i / Nodes::COLUMNS, column = i % Nodes::COLUMNS;
            int node = (first_row + row) * settings.n_node_columns + first_column + column;
            uint4 words = random_words(seed, picture, QUADS + node);
            scene.nodes[row][column] = {amplitude * R(2 * uniform(words.x) - 1),
                                        amplitude * R(2 * uniform(words.y) - 1)};
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) scene.picture = picture_of<R>(scene.drawn, extent);
    __syncthreads();
}

// The weights of four neighbouring nodes: a cubic B-spline, which is twice differentiable.
template <typename R>
__device__ inline void spline(R t, R (&weights)[TAPS]) {
    R s = 1 - t, sixth = R(1) / 6;
    weights[0] = s * s * s * sixth;
    weights[1] = (R(4) + t * t * (3 * t - 6)) * sixth;
    weights[2] = (R(4) + s * s * (3 * s - 6)) * sixth;
    weights[3] = t * t * t * sixth;
}

// By how much a pixel is moved.
template <typename R, int TILE_WIDTH, int TILE_HEIGHT>
__device__ inline Vector2<R> displacement(const Scene<R, TILE_WIDTH, TILE_HEIGHT>& scene,
                                          const Tile& tile, int row, int column, R density) {
    R behind, across[TAPS], down[TAPS];
    int top = node_of(row, density, behind) - node_of(tile.top, density, across[0]);
    spline(behind, down);
    int left = node_of(column, density, behind) - node_of(tile.left, density, across[0]);
    spline(behind, across);
    Vector2<R> sum{0, 0};
#pragma unroll
    for (int i = 0; i < TAPS; i++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            Vector2<R> node = scene.nodes[top + i][left + j];
            R weight = down[i] * across[j];
            sum = {fma(weight, node.x, sum.x), fma(weight, node.y, sum.y)};
        }
    }
    return sum;
}

// Where in 0 … size - 1 a place is looked up, and so that an int holds it.
template <typename R>
__device__ inline R looked_up(R at, int size, int mode) {
    if (mode == ZEROS) return fmin(fmax(at, R(-2)), R(size));  // -2: beside it nothing is inside
    if (mode == REFLECTION) {                                   // at the outer edges of pixels
        at = fabs(at + R(0.5));
        R turns = floor(at / size), rest = fma(-turns, R(size), at);
        at = (turns == 2 * floor(turns / 2) ? rest : size - rest) - R(0.5);
    }
    return fmin(fmax(at, R(0)), R(size - 1));
}

// The four pixels around a place of the input, row by row, and their weights.
template <typename R>
struct Taps {
    int row, column;
    R weights[TAPS];
    bool inside[TAPS];

    __device__ long long offset(int k, const Strides& strides) const {
        return (row + k / 2) * strides.row + (column + k % 2) * strides.column;
    }
};

template <typename R>
__device__ inline Taps<R> taps_at(Vector2<R> at, const Extent& extent, int mode) {
    R x = looked_up(at.x, extent.in_width, mode), y = looked_up(at.y, extent.in_height, mode);
    Taps<R> taps;
    taps.column = int(floor(x));
    taps.row = int(floor(y));
    R right = x - taps.column, below = y - taps.row;
#pragma unroll
    for (int k = 0; k < TAPS; k++) {
        int row = taps.row + k / 2, column = taps.column + k % 2;
        taps.weights[k] = (k / 2 ? below : 1 - below) * (k % 2 ? right : 1 - right);
        taps.inside[k] = unsigned(row) < unsigned(extent.in_height) &&
                         unsigned(column) < unsigned(extent.in_width);
    }
    return taps;
}

// Where in the input a place of the output, counted from the middle, comes from.
template <typename R>
__device__ inline Vector2<R> way_back(const Picture<R>& picture, R x, R y) {
    return {fma(picture.a, x, fma(picture.b, y, picture.c)),
            fma(picture.d, x, fma(picture.e, y, picture.f))};
}

// The taps of a pixel of the output.
template <typename R, int TILE_WIDTH, int TILE_HEIGHT>
__device__ inline Taps<R> taps_of(const Scene<R, TILE_WIDTH, TILE_HEIGHT>& scene, const Tile& tile,
                                  int row, int column, const Settings& settings,
                                  const Extent& extent) {
    R x = column - R(extent.out_width - 1) / 2, y = row - R(extent.out_height - 1) / 2;
    if (settings.amplitude != 0) {
        Vector2<R> by = displacement(scene, tile, row, column, R(settings.density));
        x += by.x;
        y += by.y;
    }
    return taps_at(way_back(scene.picture, x, y), extent, settings.mode);
}

// The weighted sum of the taps, for channels of one picture.
template <int CHANNELS, typename R, typename S>
__device__ inline void sample(const S* channel, const Taps<R>& taps, const Strides& strides,
                              R fill, R (&values)[CHANNELS]) {
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) values[c] = 0;
#pragma unroll
    for (int k = 0; k < TAPS; k++) {
        const S* tap = channel + taps.offset(k, strides);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            R value = taps.inside[k] ? R(widen(tap[c * strides.channel])) : fill;
            values[c] = fma(taps.weights[k], value, values[c]);
        }
    }
}

// The shares of red, green and blue in grey: ITU-R BT.601.
template <typename R>
__device__ inline R share_of_grey(int channel) {
    return channel == 0 ? R(0.2989) : channel == 1 ? R(0.587) : R(0.114);
}

// Clamps values, NaN excepted; which of them were between 0 and the bound, in bits first, ….
template <int CHANNELS, typename R>
__device__ inline unsigned clamp(R (&values)[CHANNELS], const Settings& settings, int first) {
    unsigned free = 0;
    R bound = R(settings.bound);
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
        R value = values[c];
        free |= unsigned(!settings.clamps || (value >= 0 && value <= bound)) << (first + c);
        if (settings.clamps) values[c] = value < 0 ? 0 : value > bound ? bound : value;
    }
    return free;
}

// Brightness, contrast, saturation: f v, f v + (1 - f) grey with a fixed grey, and with the
// pixel's own. Which values were not clamped, CHANNELS bits a step.
template <int CHANNELS, typename R>
__device__ inline unsigned recolour(R (&values)[CHANNELS], const Picture<R>& picture,
                                    const Settings& settings) {
    unsigned free = ~0u << 3 * CHANNELS;
    if (settings.recolours[0]) {
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) values[c] *= picture.brightness;
        free |= clamp(values, settings, 0);
    }
    if (settings.recolours[1]) {
        R beside = (1 - picture.contrast) * R(settings.grey);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) values[c] = fma(picture.contrast, values[c], beside);
        free |= clamp(values, settings, CHANNELS);
    }
    if (CHANNELS == 3 && settings.recolours[2]) {
        R grey = 0;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) grey = fma(share_of_grey<R>(c), values[c], grey);
        grey *= 1 - picture.saturation;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) values[c] = fma(picture.saturation, values[c], grey);
        free |= clamp(values, settings, 2 * CHANNELS);
    }
    return free;
}

// The gradient of recolour: from that of what it made to that of what it was given.
template <int CHANNELS, typename R>
__device__ inline void recolour_gradient(R (&gradients)[CHANNELS], unsigned free,
                                         const Picture<R>& picture, const Settings& settings) {
    if (CHANNELS == 3 && settings.recolours[2]) {
        R sum = 0;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            gradients[c] = free >> (2 * CHANNELS + c) & 1 ? gradients[c] : 0;
            sum += gradients[c];
        }
        sum *= 1 - picture.saturation;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            gradients[c] = fma(picture.saturation, gradients[c], share_of_grey<R>(c) * sum);
    }
#pragma unroll
    for (int step = 1; step >= 0; step--) {
        if (!settings.recolours[step]) continue;
        R factor = step ? picture.contrast : picture.brightness;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            gradients[c] = free >> (step * CHANNELS + c) & 1 ? factor * gradients[c] : 0;
    }
}
