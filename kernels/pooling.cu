// Pooling of tensors (batch, height, width, channels) in memory, 16 bytes of channels a thread.
//
// A contiguous tensor of PyTorch's is such a one with its planes as the batch and one channel;
// where a row of windows fits in shared memory, the tile kernels take it by bands (band.h).
#include "band.h"
#include "pooling.h"

struct Place {
    long long batch;
    int h, w;
    long long first;  // channel
};

// Where the i-th group of N channels is.
template <int N>
__device__ inline Place place_of(long long i, long long n_channels, int height, int width) {
    long long pixel = quotient(i * N, n_channels), row = quotient(pixel, width);
    long long batch = quotient(row, height);
    return {batch, int(row - batch * height), int(pixel - row * width), i * N - pixel * n_channels};
}

// The plane of a place, in a tensor of so many rows and columns.
template <int N, typename T>
__device__ inline Plane<T, N> plane_of(const T* tensor, const Place& at, int rows, int columns,
                                       long long n_channels) {
    return {tensor + at.batch * rows * columns * n_channels + at.first, columns, n_channels};
}

// y = the maximum of each window; its tap, and its index in its plane, where they are wanted.
template <typename T, typename P, int N, bool ADAPTIVE, int SIZE, int STEP, bool HAS_POSITIONS,
          bool HAS_INDICES>
__global__ void max_pool_forward_kernel(const T* x, T* y, P* positions, long long* indices,
                                        Pool pool, long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.out, pool.w.out);
    Wide<T> best[N];
    int where[N];
    Plane<T, N> plane = plane_of<N>(x, at, pool.h.in, pool.w.in, n_channels);
    max_of_window<ADAPTIVE, SIZE, STEP>(pool, at.h, at.w, plane, best, where);
    store(y + i * N, narrowed<T>(best));
    Vector<P, N> taps;
    Vector<long long, N> places;
#pragma unroll
    for (int k = 0; k < N; k++) {
        taps.values[k] = P(where[k]);
        if (HAS_INDICES) places.values[k] = index_of<ADAPTIVE>(pool, at.h, at.w, where[k]);
    }
    if (HAS_POSITIONS) store(positions + i * N, taps);
    if (HAS_INDICES) store(indices + i * N, places);
}

// dx = the sum of dy over the windows whose maximum this input is.
template <typename T, typename P, int N, bool ADAPTIVE>
__global__ void max_pool_backward_kernel(const T* dy, const P* positions, T* dx, Pool pool,
                                         long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.in, pool.w.in);
    Wide<T> sum[N] = {};
    Plane<T, N> gradients = plane_of<N>(dy, at, pool.h.out, pool.w.out, n_channels);
    Plane<P, N> taps = plane_of<N>(positions, at, pool.h.out, pool.w.out, n_channels);
    max_gradient<ADAPTIVE>(pool, at.h, at.w, gradients, taps, sum);
    store(dx + i * N, narrowed<T>(sum));
}

// The same for windows of SIZE by SIZE, STEP apart: a thread owns a patch of inputs.
template <typename T, typename P, int N, int SIZE, int STEP>
__global__ void max_pool_backward_patch_kernel(const T* dy, const P* positions, T* dx, Pool pool,
                                               long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Patches patches = patches_of<STEP>(pool, 0, pool.h.in);
    Place at = place_of<N>(i, n_channels, patches.rows, patches.columns);
    int row = patches.first_row + at.h, column = patches.first_column + at.w;
    Wide<T> sum[STEP][STEP][N] = {};
    Plane<T, N> gradients = plane_of<N>(dy, at, pool.h.out, pool.w.out, n_channels);
    Plane<P, N> taps = plane_of<N>(positions, at, pool.h.out, pool.w.out, n_channels);
    max_gradient_of_patch<SIZE, STEP>(pool, row, column, gradients, taps, sum);
#pragma unroll
    for (int place = 0; place < STEP * STEP; place++) {
        int ih = row * STEP + place / STEP - pool.h.padding;
        int iw = column * STEP + place % STEP - pool.w.padding;
        if (!is_in(pool.h, ih) || !is_in(pool.w, iw)) continue;
        long long pixel = (at.batch * pool.h.in + ih) * pool.w.in + iw;
        store(dx + pixel * n_channels + at.first, narrowed<T>(sum[place / STEP][place % STEP]));
    }
}

// y = the average of each window.
template <typename T, int N, bool ADAPTIVE>
__global__ void avg_pool_forward_kernel(const T* x, T* y, Pool pool, Average average,
                                        long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.out, pool.w.out);
    Wide<T> sum[N] = {};
    Plane<T, N> plane = plane_of<N>(x, at, pool.h.in, pool.w.in, n_channels);
    average_of_window<ADAPTIVE>(pool, average, at.h, at.w, plane, sum);
    store(y + i * N, narrowed<T>(sum));
}

// dx = the sum over the windows that cover this input of dy, divided as the average was.
template <typename T, int N, bool ADAPTIVE>
__global__ void avg_pool_backward_kernel(const T* dy, T* dx, Pool pool, Average average,
                                         long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.in, pool.w.in);
    Wide<T> sum[N] = {};
    Plane<T, N> plane = plane_of<N>(dy, at, pool.h.out, pool.w.out, n_channels);
    average_gradient<ADAPTIVE>(pool, average, at.h, at.w, plane, sum);
    store(dx + i * N, narrowed<T>(sum));
}

// The same as max_pool_forward_kernel, by tiles.
template <typename T, typename P, bool ADAPTIVE, int SIZE, int STEP, bool HAS_POSITIONS,
          bool HAS_INDICES, int TILE_BYTES>
__global__ void max_pool_forward_tile_kernel(const T* x, T* y, P* positions, long long* indices,
                                             Pool pool, long long n_planes, long long planes,
                                             long long rows) {
    alignas(16) __shared__ T x_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T y_tile[N_OUT<T, TILE_BYTES>];
    alignas(16) __shared__ P taps_tile[HAS_POSITIONS ? N_OUT<T, TILE_BYTES> : 16];
    Work work = work_of<ADAPTIVE, false>(pool, n_planes, planes, rows);
    read_band(x, work.from, n_planes * pool.h.in * pool.w.in, x_tile);
    __syncthreads();
    for_each_in(work.to, pool.h.out, pool.w.out, [&](int plane, int oh, int ow, int i) {
        Wide<T> best[1];
        int where[1];
        Plane<T, 1> inputs = plane_in(x_tile, work.from, plane, pool.h.in, pool.w.in);
        max_of_window<ADAPTIVE, SIZE, STEP>(pool, oh, ow, inputs, best, where);
        y_tile[offset_of<T>(work.to) + i] = narrow<T>(best[0]);
        if (HAS_POSITIONS) taps_tile[offset_of<P>(work.to) + i] = P(where[0]);
        if (HAS_INDICES) indices[work.to.first + i] = index_of<ADAPTIVE>(pool, oh, ow, where[0]);
    });
    __syncthreads();
    write_band(y, work.to, y_tile);
    if (HAS_POSITIONS) write_band(positions, work.to, taps_tile);
}

// The same as max_pool_backward_kernel, by tiles.
template <typename T, typename P, bool ADAPTIVE, int SIZE, int STEP, int TILE_BYTES>
__global__ void max_pool_backward_tile_kernel(const T* dy, const P* positions, T* dx, Pool pool,
                                              long long n_planes, long long planes,
                                              long long rows) {
    alignas(16) __shared__ T dx_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T dy_tile[N_OUT<T, TILE_BYTES>];
    alignas(16) __shared__ P taps_tile[N_OUT<T, TILE_BYTES>];
    Work work = work_of<ADAPTIVE, true>(pool, n_planes, planes, rows);
    read_band(dy, work.from, n_planes * pool.h.out * pool.w.out, dy_tile);
    read_band(positions, work.from, n_planes * pool.h.out * pool.w.out, taps_tile);
    __syncthreads();
    auto gradients = [&](int plane) {
        return plane_in(dy_tile, work.from, plane, pool.h.out, pool.w.out);
    };
    auto taps = [&](int plane) {
        return plane_in(taps_tile, work.from, plane, pool.h.out, pool.w.out);
    };
    if constexpr (SIZE > 0) {
        for_each_patch<STEP>(pool, work.to, [&](int plane, int row, int column) {
            Wide<T> sum[STEP][STEP][1] = {};
            max_gradient_of_patch<SIZE, STEP>(pool, row, column, gradients(plane), taps(plane),
                                              sum);
#pragma unroll
            for (int place = 0; place < STEP * STEP; place++) {
                int ih = row * STEP + place / STEP - pool.h.padding - work.to.row;
                int iw = column * STEP + place % STEP - pool.w.padding;
                if (ih < 0 || ih >= work.to.rows || !is_in(pool.w, iw)) continue;
                int i = (plane * pool.h.in + ih) * pool.w.in + iw;
                dx_tile[offset_of<T>(work.to) + i] = narrow<T>(sum[place / STEP][place % STEP][0]);
            }
        });
    } else {
        for_each_in(work.to, pool.h.in, pool.w.in, [&](int plane, int ih, int iw, int i) {
            Wide<T> sum[1] = {};
            max_gradient<ADAPTIVE>(pool, ih, iw, gradients(plane), taps(plane), sum);
            dx_tile[offset_of<T>(work.to) + i] = narrow<T>(sum[0]);
        });
    }
    __syncthreads();
    write_band(dx, work.to, dx_tile);
}

// The same as avg_pool_forward_kernel, by tiles.
template <typename T, bool ADAPTIVE, int TILE_BYTES>
__global__ void avg_pool_forward_tile_kernel(const T* x, T* y, Pool pool, Average average,
                                             long long n_planes, long long planes,
                                             long long rows) {
    alignas(16) __shared__ T x_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T y_tile[N_OUT<T, TILE_BYTES>];
    Work work = work_of<ADAPTIVE, false>(pool, n_planes, planes, rows);
    read_band(x, work.from, n_planes * pool.h.in * pool.w.in, x_tile);
    __syncthreads();
    for_each_in(work.to, pool.h.out, pool.w.out, [&](int plane, int oh, int ow, int i) {
        Wide<T> sum[1] = {};
        Plane<T, 1> inputs = plane_in(x_tile, work.from, plane, pool.h.in, pool.w.in);
        average_of_window<ADAPTIVE>(pool, average, oh, ow, inputs, sum);
        y_tile[offset_of<T>(work.to) + i] = narrow<T>(sum[0]);
    });
    __syncthreads();
    write_band(y, work.to, y_tile);
}

// The same as avg_pool_backward_kernel, by tiles.
template <typename T, bool ADAPTIVE, int TILE_BYTES>
__global__ void avg_pool_backward_tile_kernel(const T* dy, T* dx, Pool pool, Average average,
                                              long long n_planes, long long planes,
                                              long long rows) {
    alignas(16) __shared__ T dx_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T dy_tile[N_OUT<T, TILE_BYTES>];
    Work work = work_of<ADAPTIVE, true>(pool, n_planes, planes, rows);
    read_band(dy, work.from, n_planes * pool.h.out * pool.w.out, dy_tile);
    __syncthreads();
    for_each_in(work.to, pool.h.in, pool.w.in, [&](int plane, int ih, int iw, int i) {
        Wide<T> sum[1] = {};
        Plane<T, 1> gradients = plane_in(dy_tile, work.from, plane, pool.h.out, pool.w.out);
        average_gradient<ADAPTIVE>(pool, average, ih, iw, gradients, sum);
        dx_tile[offset_of<T>(work.to) + i] = narrow<T>(sum[0]);
    });
    __syncthreads();
    write_band(dx, work.to, dx_tile);
}
