// Augmentation: each picture is distorted by parameters of its own, drawn from a seed and its
// number, in one pass: the way back, displacement, bilinear sampling, colour. Its gradient does not
// depend on who comes first: a pixel finds those that it was a tap of, or, where that is hard, they
// add to it in integers.
#include "augment.h"

// What pixels are computed in.
template <typename S, typename T>
using Real = decltype(Wide<S>() + Wide<T>());

// Divides, and not by a product: bytes that nothing changes are PyTorch's x / 255.
template <int CHANNELS, typename R>
__device__ inline void divide(R (&values)[CHANNELS], R divisor) {
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) values[c] /= divisor;
}

// Writes a tile, N elements of a line at a time; a line has all of its channels where LAST.
template <int N, bool LAST, int CHANNELS, int TILE_WIDTH, int TILE_HEIGHT, typename T>
__device__ inline void write_lines(T* y, const T* pixels, const Tile& tile, const Extent& extent) {
    constexpr int LINE = TILE_WIDTH * (LAST ? CHANNELS : 1);
    constexpr int LINES = TILE_HEIGHT * (LAST ? 1 : CHANNELS);
    int length = tile.width * (LAST ? CHANNELS : 1);
    long long n_channels = extent.n_channels;
#pragma unroll 1
    for (int i = threadIdx.x; i < LINES * LINE / N; i += blockDim.x) {
        int line = i / (LINE / N), at = i % (LINE / N) * N, row = line % TILE_HEIGHT;
        if (row >= tile.height || at >= length) continue;
        long long plane = tile.picture;
        if (!LAST) plane = plane * n_channels + tile.channel + line / TILE_HEIGHT;
        long long pixel = (plane * extent.out_height + tile.top + row) * extent.out_width;
        long long to = pixel + tile.left + (LAST ? at / CHANNELS : at);
        if (LAST) to = to * n_channels + tile.channel + at % CHANNELS;
        const T* from = pixels + line * LINE + at;
        if (N > 1)  // as one word: a Vector of the line is here stored by its elements
            *reinterpret_cast<uint4*>(y + to) = *reinterpret_cast<const uint4*>(from);
        else
            y[to] = *from;
    }
}

// The same, by 16 bytes where lines are ``wide``.
template <bool LAST, int CHANNELS, int TILE_WIDTH, int TILE_HEIGHT, typename T>
__device__ inline void write_tile(T* y, const T* pixels, const Tile& tile, const Extent& extent,
                                  bool wide) {
    constexpr int N = 16 / sizeof(T);
    if (wide)
        write_lines<N, LAST, CHANNELS, TILE_WIDTH, TILE_HEIGHT>(y, pixels, tile, extent);
    else
        write_lines<1, LAST, CHANNELS, TILE_WIDTH, TILE_HEIGHT>(y, pixels, tile, extent);
}

// Puts the channels of pixel number i of a tile of SIZE where write_tile takes them from.
template <bool LAST, int SIZE, int CHANNELS, typename R, typename T>
__device__ inline void put(const R (&values)[CHANNELS], T* pixels, int i) {
#pragma unroll
    for (int c = 0; c < CHANNELS; c++)
        pixels[LAST ? i * CHANNELS + c : c * SIZE + i] = narrow<T>(Wide<T>(values[c]));
}

// y[n] = picture n of images, distorted and recoloured. A block owns a tile, of CHANNELS channels.
// LAST: y lies channels_last in memory, and not contiguous. ``wide``: its lines can be written by
// 16 bytes; for LAST, CHANNELS is then all channels.
template <typename S, typename T, int CHANNELS, bool LAST, int TILE_WIDTH, int TILE_HEIGHT>
__global__ void augment_forward_kernel(const S* images, const long long* seed, T* y,
                                       Settings settings, Extent extent, Strides strides,
                                       long long wide) {
    using R = Real<S, T>;
    __shared__ Scene<R, TILE_WIDTH, TILE_HEIGHT> scene;
    alignas(16) __shared__ T pixels[CHANNELS * TILE_HEIGHT * TILE_WIDTH];
    Tile tile = tile_of<CHANNELS, TILE_WIDTH, TILE_HEIGHT>(extent, 0);
    set_scene(scene, tile, *seed, settings, extent);
    const S* channel = images + tile.picture * strides.picture + tile.channel * strides.channel;
    for (int i = threadIdx.x; i < TILE_HEIGHT * TILE_WIDTH; i += blockDim.x) {
        int row = i / TILE_WIDTH, column = i % TILE_WIDTH;
        if (row >= tile.height || column >= tile.width) continue;
        Taps<R> taps = taps_of(scene, tile, tile.top + row, tile.left + column, settings, extent);
        R values[CHANNELS];
        sample(channel, taps, strides, R(settings.fill), values);
        recolour(values, scene.picture, settings);
        if (settings.divisor != 1) divide(values, R(settings.divisor));
        put<LAST, TILE_HEIGHT * TILE_WIDTH>(values, pixels, i);
    }
    __syncthreads();
    write_tile<LAST, CHANNELS, TILE_WIDTH, TILE_HEIGHT>(y, pixels, tile, extent, wide);
}

// The way forth, from a place of the input: and within what of it the pixels of the output are
// that have the place as a tap. In float64, since a pixel that is looked at in vain does no harm,
// and one that is not would be missing: EXCESS is more than the way back is rounded by.
struct WayForth {
    double a, b, d, e, c, f, reach_x, reach_y;
};
const double EXCESS = 0x1p-20;

template <typename R>
__device__ inline WayForth way_forth(const Picture<R>& picture, const Extent& extent) {
    double a = picture.a, b = picture.b, d = picture.d, e = picture.e;
    double divisor = a * e - b * d, width = extent.out_width, height = extent.out_height;
    WayForth forth{e / divisor, -b / divisor, -d / divisor, a / divisor, picture.c, picture.f};
    double x = 1 + EXCESS * (fabs(a) * width + fabs(b) * height + fabs(forth.c));
    double y = 1 + EXCESS * (fabs(d) * width + fabs(e) * height + fabs(forth.f));
    forth.reach_x = fabs(forth.a) * x + fabs(forth.b) * y;
    forth.reach_y = fabs(forth.d) * x + fabs(forth.e) * y;
    return forth;
}

// The first and the last pixel within reach of a place, of so many; all if it is no number.
struct Span {
    int first, last;
};

__device__ inline Span span_of(double place, double reach, int size) {
    return {int(fmin(fmax(ceil(place - reach), 0.0), double(size))),
            int(fmax(fmin(floor(place + reach), size - 1.0), -1.0))};
}

// Adds what the pixels of the output give to one of the input that is a tap of theirs.
template <int CHANNELS, typename R, typename T>
__device__ inline void gather(const T* dy, const Picture<R>& picture, const WayForth& forth,
                              int row, int column, const Extent& extent, const Strides& strides,
                              R (&gradients)[CHANNELS]) {
    double x = column - forth.c, y = row - forth.f;
    double middle_x = (extent.out_width - 1) / 2.0, middle_y = (extent.out_height - 1) / 2.0;
    Span across = span_of(forth.a * x + forth.b * y + middle_x, forth.reach_x, extent.out_width);
    Span down = span_of(forth.d * x + forth.e * y + middle_y, forth.reach_y, extent.out_height);
    for (int i = down.first; i <= down.last; i++) {
        for (int j = across.first; j <= across.last; j++) {
            Vector2<R> place = way_back(picture, j - R(middle_x), i - R(middle_y));
            Taps<R> taps = taps_at(place, extent, ZEROS);
            int below = row - taps.row, right = column - taps.column;
            if (unsigned(below) > 1 || unsigned(right) > 1) continue;
            R upper = right ? taps.weights[1] : taps.weights[0];
            R lower = right ? taps.weights[3] : taps.weights[2], weight = below ? lower : upper;
            const T* gradient = dy + i * strides.row + j * strides.column;
#pragma unroll
            for (int c = 0; c < CHANNELS; c++)
                gradients[c] = fma(weight, R(widen(gradient[c * strides.channel])), gradients[c]);
        }
    }
}

// dx[n] = the gradient of picture n, which was distorted by a way back alone: mode is ZEROS, there
// is no field, and no colour was clamped. A block owns a tile of the input; else as above.
template <typename S, typename T, int CHANNELS, bool LAST, int TILE_WIDTH, int TILE_HEIGHT>
__global__ void augment_gather_kernel(const T* dy, const long long* seed, S* dx, Settings settings,
                                      Extent extent, Strides strides, long long wide) {
    using R = Real<S, T>;
    __shared__ Scene<R, TILE_WIDTH, TILE_HEIGHT> scene;
    __shared__ WayForth forth;
    alignas(16) __shared__ S pixels[CHANNELS * TILE_HEIGHT * TILE_WIDTH];
    Extent input{extent.n_channels, extent.out_height, extent.out_width, extent.in_height,
                 extent.in_width};
    Tile tile = tile_of<CHANNELS, TILE_WIDTH, TILE_HEIGHT>(input, 0);
    set_scene(scene, tile, *seed, settings, extent);
    if (threadIdx.x == 0) forth = way_forth(scene.picture, extent);
    __syncthreads();
    dy += tile.picture * strides.picture + tile.channel * strides.channel;
    for (int i = threadIdx.x; i < TILE_HEIGHT * TILE_WIDTH; i += blockDim.x) {
        int row = i / TILE_WIDTH, column = i % TILE_WIDTH;
        if (row >= tile.height || column >= tile.width) continue;
        R gradients[CHANNELS] = {};
        gather(dy, scene.picture, forth, tile.top + row, tile.left + column, extent, strides,
               gradients);
        recolour_gradient(gradients, ~0u, scene.picture, settings);
        put<LAST, TILE_HEIGHT * TILE_WIDTH>(gradients, pixels, i);
    }
    __syncthreads();
    write_tile<LAST, CHANNELS, TILE_WIDTH, TILE_HEIGHT>(dx, pixels, tile, input, wide);
}

// exponent = the least with |dy| < 2^exponent for all finite dy other than 0, or what it was.
template <typename T>
__global__ void augment_exponent_kernel(const T* dy, int* exponent, Extent extent, Strides strides,
                                        long long n_elements) {
    Wide<T> largest = 0;
    for (long long i = this_thread(); i < n_elements; i += (long long)gridDim.x * blockDim.x) {
        long long row = quotient(i, extent.out_width), plane = quotient(row, extent.out_height);
        long long picture = quotient(plane, extent.n_channels);
        long long at = picture * strides.picture +
                       (plane - picture * extent.n_channels) * strides.channel +
                       (row - plane * extent.out_height) * strides.row +
                       (i - row * extent.out_width) * strides.column;
        Wide<T> size = fabs(widen(dy[at]));
        if (size > largest && size - size == 0) largest = size;
    }
    for (int lanes = warpSize / 2; lanes; lanes /= 2)
        largest = fmax(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (threadIdx.x % warpSize == 0 && largest > 0) atomicMax(exponent, ilogb(double(largest)) + 1);
}

// The unit in which gradients are added up, as a power of two.
__device__ inline int unit_exponent(const int* exponent, long long shift) {
    return min(int(shift) - *exponent, 1000);
}

// What a pixel of the input gets beside numbers, in four bits of a word for each.
const unsigned IS_NAN = 1, IS_INFINITE = 2, IS_MINUS_INFINITE = 4;

template <typename R>
__device__ inline void add(long long* sums, unsigned* marks, long long at, long long marked,
                           R value, double unit) {
    if (value - value == 0) {
        unsigned long long added = llrint(value * unit);
        atomicAdd(reinterpret_cast<unsigned long long*>(sums) + at, added);
    } else {
        unsigned mark = value != value ? IS_NAN : value > 0 ? IS_INFINITE : IS_MINUS_INFINITE;
        atomicOr(marks + marked / 8, mark << marked % 8 * 4);
    }
}

// sums += the gradients of the pixels of images, from picture ``first`` on, in units of
// 2^(*exponent - shift); marks, of all pictures, say where something infinite is added, or a NaN.
// Where colours are clamped, images are needed to see which.
template <typename S, typename T, int CHANNELS, int TILE_WIDTH, int TILE_HEIGHT>
__global__ void augment_scatter_kernel(const T* dy, const S* images, const long long* seed,
                                       const int* exponent, long long* sums, unsigned* marks,
                                       Settings settings, Extent extent, Strides dy_strides,
                                       Strides strides, Strides sum_strides, long long first,
                                       long long shift) {
    using R = Real<S, T>;
    __shared__ Scene<R, TILE_WIDTH, TILE_HEIGHT> scene;
    Tile tile = tile_of<CHANNELS, TILE_WIDTH, TILE_HEIGHT>(extent, first);
    set_scene(scene, tile, *seed, settings, extent);
    double unit = ldexp(1.0, unit_exponent(exponent, shift));
    const S* channel = images + tile.picture * strides.picture + tile.channel * strides.channel;
    dy += tile.picture * dy_strides.picture + tile.channel * dy_strides.channel;
    long long plane = tile.channel * sum_strides.channel, before = first * sum_strides.picture;
    plane += (tile.picture - first) * sum_strides.picture;
    for (int i = threadIdx.x; i < TILE_HEIGHT * TILE_WIDTH; i += blockDim.x) {
        int row = tile.top + i / TILE_WIDTH, column = tile.left + i % TILE_WIDTH;
        if (row >= extent.out_height || column >= extent.out_width) continue;
        Taps<R> taps = taps_of(scene, tile, row, column, settings, extent);
        R values[CHANNELS] = {}, gradients[CHANNELS];
        if (images) sample(channel, taps, strides, R(settings.fill), values);
        unsigned free = recolour(values, scene.picture, settings);
        const T* gradient = dy + row * dy_strides.row + column * dy_strides.column;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++)
            gradients[c] = R(widen(gradient[c * dy_strides.channel]));
        recolour_gradient(gradients, free, scene.picture, settings);
#pragma unroll
        for (int k = 0; k < TAPS; k++) {
            if (!taps.inside[k]) continue;
            long long at = plane + taps.offset(k, sum_strides);
#pragma unroll
            for (int c = 0; c < CHANNELS; c++, at += sum_strides.channel)
                add(sums, marks, at, before + at, gradients[c] * taps.weights[k], unit);
        }
    }
}

// dx = sums, from element ``first`` of dx on, as numbers; sums are 0 afterwards.
template <typename T, int N>
__global__ void augment_gradient_kernel(const int* exponent, long long* sums, const unsigned* marks,
                                        T* dx, long long first, long long n_elements,
                                        long long shift) {
    long long i = this_thread() * N;
    if (i >= n_elements) return;
    double unit = ldexp(1.0, -unit_exponent(exponent, shift));
    Vector<long long, N> sum = load<N>(sums + i);
    unsigned marked = marks[(first + i) / 8] >> (first + i) % 8 * 4;  // N is 8, or 1
    Vector<T, N> result;
#pragma unroll
    for (int k = 0; k < N; k++) {
        unsigned mark = marked >> 4 * k;
        Wide<T> value = Wide<T>(sum.values[k] * unit);
        if (mark & IS_INFINITE) value = value + __uint_as_float(0x7f800000u);
        if (mark & IS_MINUS_INFINITE) value = value - __uint_as_float(0x7f800000u);
        if (mark & IS_NAN) value = __uint_as_float(0x7fffffffu);
        result.values[k] = narrow<T>(value);
        sum.values[k] = 0;
    }
    store(dx + first + i, result);
    store(sums + i, sum);
}
