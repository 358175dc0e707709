// Pooling of contiguous planes, a band of rows a block, by way of shared memory.
//
// A band of rows is one piece of memory, so it is read and written by 16 bytes whatever the rows'
// length. A block's band is some rows of one plane, or all rows of several.
#pragma once
#include "pooling.h"

template <typename T>
constexpr int N_WIDE = 16 / sizeof(T);

// Elements of the tile of the larger side of a pooling, its input, and of the smaller.
template <typename T, int TILE_BYTES>
constexpr int N_IN = TILE_BYTES / sizeof(T);
template <typename T, int TILE_BYTES>
constexpr int N_OUT = N_IN<T, TILE_BYTES> / 2;

// Rows from (and rows to) of planes: elements first to first + size - 1.
struct Band {
    long long first;
    int row, rows, size;
};

__device__ inline Band band_of(long long plane, int planes, int row, int rows, int height,
                               int width) {
    long long first = (plane * height + row) * width;
    return {first, row, rows, ((planes - 1) * height + rows) * width};
}

// The rows of the other side that a band's rows meet, from the spans of its first and its last. The
// first may pass over rows before its first that the next one has: where it is dilated, and padded.
__device__ inline Band other_band(long long plane, int planes, Span first, Span last, int height,
                                  int width) {
    if (planes > 1) return band_of(plane, planes, 0, height, height, width);
    int row = min(max(first.first - first.tap * first.step, 0), height), end = max(last.end, row);
    return band_of(plane, 1, row, end - row, height, width);
}

// Where a band's first element stands in its tile, so that 16 bytes there are 16 bytes in memory.
template <typename T>
__device__ inline int offset_of(const Band& band) {
    return int(band.first % N_WIDE<T>);
}

// Reads a band, and what shares its first and last 16 bytes; not past the tensor's n_elements.
template <typename T>
__device__ inline void read_band(const T* tensor, const Band& band, long long n_elements, T* tile) {
    constexpr int N = N_WIDE<T>;
    int offset = offset_of<T>(band);
    for (int i = threadIdx.x * N; i < offset + band.size; i += blockDim.x * N) {
        long long at = band.first - offset + i;
        if (at + N <= n_elements) {
            store(tile + i, load<N>(tensor + at));
        } else {
#pragma unroll 1
            for (int k = 0; at + k < n_elements; k++) tile[i + k] = tensor[at + k];
        }
    }
}

// Writes a band, and nothing beside it.
template <typename T>
__device__ inline void write_band(T* tensor, const Band& band, const T* tile) {
    constexpr int N = N_WIDE<T>;
    int offset = offset_of<T>(band), end = offset + band.size;
    for (int i = threadIdx.x * N; i < end; i += blockDim.x * N) {
        long long at = band.first - offset + i;
        if (i >= offset && i + N <= end) {
            // the plain store, by name: an assignment is here compiled to four of 4 bytes
            const uint4* from = reinterpret_cast<const uint4*>(tile + i);
            __stwb(reinterpret_cast<uint4*>(tensor + at), *from);
        } else {
#pragma unroll 1
            for (int k = max(offset - i, 0); k < N && i + k < end; k++) {
                tensor[at + k] = tile[i + k];
            }
        }
    }
}

// What a block reads and what it writes.
struct Work {
    Band from, to;
};

// The share of this block of n_planes planes: planes whole ones, or rows rows of one, of the
// windows or, backward, of the inputs; and what they meet on the other side.
template <bool ADAPTIVE, bool BACKWARD>
__device__ inline Work work_of(const Pool& pool, long long n_planes, long long planes,
                               long long rows) {
    int height = BACKWARD ? pool.h.in : pool.h.out, width = BACKWARD ? pool.w.in : pool.w.out;
    int n_bands = (height + int(rows) - 1) / int(rows);
    long long plane = blockIdx.x / n_bands * planes;
    int n = int(min(planes, n_planes - plane));
    int row = blockIdx.x % n_bands * int(rows), last = min(row + int(rows), height) - 1;
    Band to = band_of(plane, n, row, last - row + 1, height, width);
    if (BACKWARD) {
        Span top = windows_over<ADAPTIVE>(pool.h, row), end = windows_over<ADAPTIVE>(pool.h, last);
        return {other_band(plane, n, top, end, pool.h.out, pool.w.out), to};
    }
    Span top = window_of<ADAPTIVE>(pool.h, row), end = window_of<ADAPTIVE>(pool.h, last);
    return {other_band(plane, n, top, end, pool.h.in, pool.w.in), to};
}

// Calls f(i, line, column) for the elements i of lines of some columns, spread over threads: what
// is divided is so but once.
template <typename F>
__device__ inline void for_each(int n, int columns, F f) {
    int lines = blockDim.x / columns, rest = blockDim.x % columns;
    int line = threadIdx.x / columns, column = threadIdx.x % columns;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x, line += lines, column += rest) {
        if (column >= columns) {
            column -= columns;
            line++;
        }
        f(i, line, column);
    }
}

// Calls f(plane, row, column, place in the band) for the elements of a band, spread over threads.
template <typename F>
__device__ inline void for_each_in(const Band& band, int height, int width, F f) {
    for_each(band.size, width, [&](int i, int line, int column) {
        int plane = band.rows < height ? 0 : line / height;
        f(plane, band.row + line - plane * height, column, i);
    });
}

// Calls f(plane, row, column) for the patches of a band of inputs, spread over threads.
template <int STEP, typename F>
__device__ inline void for_each_patch(const Pool& pool, const Band& band, F f) {
    Patches patches = patches_of<STEP>(pool, band.row, band.rows);
    int planes = band.rows < pool.h.in ? 1 : band.size / (pool.h.in * pool.w.in);
    int n = planes * patches.rows * patches.columns;
    for_each(n, patches.columns, [&](int i, int line, int column) {
        int plane = planes == 1 ? 0 : line / patches.rows;
        int row = line - plane * patches.rows;
        f(plane, patches.first_row + row, patches.first_column + column);
    });
}

// A plane of a band, as it stands in a tile: its rows count from 0 in the tensor.
template <typename T>
__device__ inline Plane<T, 1> plane_in(const T* tile, const Band& band, int plane, int height,
                                       int width) {
    return {tile + offset_of<T>(band) + (plane * height - band.row) * width, width, 1};
}
