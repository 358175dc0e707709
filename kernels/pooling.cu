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

// y = the maximum of each window; its tap, and its index in its plane, where they are wanted.
template <typename T, typename P, int N, bool ADAPTIVE, bool HAS_POSITIONS, bool HAS_INDICES>
__global__ void max_pool_forward_kernel(const T* x, T* y, P* positions, long long* indices,
                                        Pool pool, long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.out, pool.w.out);
    const T* plane = x + at.batch * pool.h.in * pool.w.in * n_channels + at.first;
    auto at_input = [&](int ih, int iw) {
        return load<N>(plane + ((long long)ih * pool.w.in + iw) * n_channels);
    };
    Wide<T> best[N];
    int where[N];
    max_of_window<ADAPTIVE>(pool, at.h, at.w, at_input, best, where);
    Vector<T, N> result;
    Vector<P, N> taps;
    Vector<long long, N> places;
#pragma unroll
    for (int k = 0; k < N; k++) {
        result.values[k] = narrow<T>(best[k]);
        taps.values[k] = P(where[k]);
        if (HAS_INDICES) places.values[k] = index_of<ADAPTIVE>(pool, at.h, at.w, where[k]);
    }
    store(y + i * N, result);
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
    long long plane = at.batch * pool.h.out * pool.w.out * n_channels + at.first;
    auto at_window = [&](int oh, int ow) {
        return plane + ((long long)oh * pool.w.out + ow) * n_channels;
    };
    Wide<T> sum[N] = {};
    max_gradient<ADAPTIVE>(
        pool, at.h, at.w, [&](int oh, int ow) { return load<N>(dy + at_window(oh, ow)); },
        [&](int oh, int ow) { return load<N>(positions + at_window(oh, ow)); }, sum);
    Vector<T, N> result;
    for (int k = 0; k < N; k++) result.values[k] = narrow<T>(sum[k]);
    store(dx + i * N, result);
}

// y = the average of each window.
template <typename T, int N, bool ADAPTIVE>
__global__ void avg_pool_forward_kernel(const T* x, T* y, Pool pool, Average average,
                                        long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.out, pool.w.out);
    const T* plane = x + at.batch * pool.h.in * pool.w.in * n_channels + at.first;
    auto at_input = [&](int ih, int iw) {
        return load<N>(plane + ((long long)ih * pool.w.in + iw) * n_channels);
    };
    Wide<T> sum[N] = {};
    average_of_window<ADAPTIVE>(pool, average, at.h, at.w, at_input, sum);
    Vector<T, N> result;
    for (int k = 0; k < N; k++) result.values[k] = narrow<T>(sum[k]);
    store(y + i * N, result);
}

// dx = the sum over the windows that cover this input of dy, divided as the average was.
template <typename T, int N, bool ADAPTIVE>
__global__ void avg_pool_backward_kernel(const T* dy, T* dx, Pool pool, Average average,
                                         long long n_vectors, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Place at = place_of<N>(i, n_channels, pool.h.in, pool.w.in);
    const T* plane = dy + at.batch * pool.h.out * pool.w.out * n_channels + at.first;
    auto at_window = [&](int oh, int ow) {
        return load<N>(plane + ((long long)oh * pool.w.out + ow) * n_channels);
    };
    Wide<T> sum[N] = {};
    average_gradient<ADAPTIVE>(pool, average, at.h, at.w, at_window, sum);
    Vector<T, N> result;
    for (int k = 0; k < N; k++) result.values[k] = narrow<T>(sum[k]);
    store(dx + i * N, result);
}

// y = the maximum of each window; its tap, and its index in its plane, where they are wanted.
template <typename T, typename P, bool ADAPTIVE, bool HAS_POSITIONS, bool HAS_INDICES,
          int TILE_BYTES>
__global__ void max_pool_forward_tile_kernel(const T* x, T* y, P* positions, long long* indices,
                                             Pool pool, long long n_planes, long long planes,
                                             long long rows) {
    alignas(16) __shared__ T x_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T y_tile[N_OUT<T, TILE_BYTES>];
    alignas(16) __shared__ P taps_tile[HAS_POSITIONS ? N_OUT<T, TILE_BYTES> : 16];
    Share share = share_of(n_planes, planes, pool.h.out, rows);
    Span first = window_of<ADAPTIVE>(pool.h, share.row);
    Span last = window_of<ADAPTIVE>(pool.h, share.row + share.rows - 1);
    Band from = other_band(share.plane, share.planes, first, last, pool.h.in, pool.w.in);
    Band to = band_of(share.plane, share.planes, share.row, share.rows, pool.h.out, pool.w.out);
    read_band(x, from, n_planes * pool.h.in * pool.w.in, x_tile);
    __syncthreads();
    for_each_in(to, pool.h.out, pool.w.out, [&](int plane, int oh, int ow, int i) {
        int start = offset_of<T>(from) + (plane * pool.h.in - from.row) * pool.w.in;
        Wide<T> best[1];
        int where[1];
        max_of_window<ADAPTIVE>(
            pool, oh, ow,
            [&](int ih, int iw) { return element(x_tile, start + ih * pool.w.in + iw); }, best,
            where);
        y_tile[offset_of<T>(to) + i] = narrow<T>(best[0]);
        if (HAS_POSITIONS) taps_tile[offset_of<P>(to) + i] = P(where[0]);
        if (HAS_INDICES) indices[to.first + i] = index_of<ADAPTIVE>(pool, oh, ow, where[0]);
    });
    __syncthreads();
    write_band(y, to, y_tile);
    if (HAS_POSITIONS) write_band(positions, to, taps_tile);
}

// dx = the sum of dy over the windows whose maximum this input is.
template <typename T, typename P, bool ADAPTIVE, int TILE_BYTES>
__global__ void max_pool_backward_tile_kernel(const T* dy, const P* positions, T* dx, Pool pool,
                                              long long n_planes, long long planes,
                                              long long rows) {
    alignas(16) __shared__ T dx_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T dy_tile[N_OUT<T, TILE_BYTES>];
    alignas(16) __shared__ P taps_tile[N_OUT<T, TILE_BYTES>];
    Share share = share_of(n_planes, planes, pool.h.in, rows);
    Span first = windows_over<ADAPTIVE>(pool.h, share.row);
    Span last = windows_over<ADAPTIVE>(pool.h, share.row + share.rows - 1);
    Band from = other_band(share.plane, share.planes, first, last, pool.h.out, pool.w.out);
    Band to = band_of(share.plane, share.planes, share.row, share.rows, pool.h.in, pool.w.in);
    long long n_elements = n_planes * pool.h.out * pool.w.out;
    read_band(dy, from, n_elements, dy_tile);
    read_band(positions, from, n_elements, taps_tile);
    __syncthreads();
    for_each_in(to, pool.h.in, pool.w.in, [&](int plane, int ih, int iw, int i) {
        int start = (plane * pool.h.out - from.row) * pool.w.out;
        Wide<T> sum[1] = {};
        max_gradient<ADAPTIVE>(
            pool, ih, iw,
            [&](int oh, int ow) {
                return element(dy_tile, offset_of<T>(from) + start + oh * pool.w.out + ow);
            },
            [&](int oh, int ow) {
                return element(taps_tile, offset_of<P>(from) + start + oh * pool.w.out + ow);
            },
            sum);
        dx_tile[offset_of<T>(to) + i] = narrow<T>(sum[0]);
    });
    __syncthreads();
    write_band(dx, to, dx_tile);
}

// y = the average of each window.
template <typename T, bool ADAPTIVE, int TILE_BYTES>
__global__ void avg_pool_forward_tile_kernel(const T* x, T* y, Pool pool, Average average,
                                             long long n_planes, long long planes,
                                             long long rows) {
    alignas(16) __shared__ T x_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T y_tile[N_OUT<T, TILE_BYTES>];
    Share share = share_of(n_planes, planes, pool.h.out, rows);
    Span first = window_of<ADAPTIVE>(pool.h, share.row);
    Span last = window_of<ADAPTIVE>(pool.h, share.row + share.rows - 1);
    Band from = other_band(share.plane, share.planes, first, last, pool.h.in, pool.w.in);
    Band to = band_of(share.plane, share.planes, share.row, share.rows, pool.h.out, pool.w.out);
    read_band(x, from, n_planes * pool.h.in * pool.w.in, x_tile);
    __syncthreads();
    for_each_in(to, pool.h.out, pool.w.out, [&](int plane, int oh, int ow, int i) {
        int start = offset_of<T>(from) + (plane * pool.h.in - from.row) * pool.w.in;
        Wide<T> sum[1] = {};
        average_of_window<ADAPTIVE>(
            pool, average, oh, ow,
            [&](int ih, int iw) { return element(x_tile, start + ih * pool.w.in + iw); }, sum);
        y_tile[offset_of<T>(to) + i] = narrow<T>(sum[0]);
    });
    __syncthreads();
    write_band(y, to, y_tile);
}

// dx = the sum over the windows that cover this input of dy, divided as the average was.
template <typename T, bool ADAPTIVE, int TILE_BYTES>
__global__ void avg_pool_backward_tile_kernel(const T* dy, T* dx, Pool pool, Average average,
                                              long long n_planes, long long planes,
                                              long long rows) {
    alignas(16) __shared__ T dx_tile[N_IN<T, TILE_BYTES>];
    alignas(16) __shared__ T dy_tile[N_OUT<T, TILE_BYTES>];
    Share share = share_of(n_planes, planes, pool.h.in, rows);
    Span first = windows_over<ADAPTIVE>(pool.h, share.row);
    Span last = windows_over<ADAPTIVE>(pool.h, share.row + share.rows - 1);
    Band from = other_band(share.plane, share.planes, first, last, pool.h.out, pool.w.out);
    Band to = band_of(share.plane, share.planes, share.row, share.rows, pool.h.in, pool.w.in);
    read_band(dy, from, n_planes * pool.h.out * pool.w.out, dy_tile);
    __syncthreads();
    for_each_in(to, pool.h.in, pool.w.in, [&](int plane, int ih, int iw, int i) {
        int start = offset_of<T>(from) + (plane * pool.h.out - from.row) * pool.w.out;
        Wide<T> sum[1] = {};
        average_gradient<ADAPTIVE>(
            pool, average, ih, iw,
            [&](int oh, int ow) { return element(dy_tile, start + oh * pool.w.out + ow); }, sum);
        dx_tile[offset_of<T>(to) + i] = narrow<T>(sum[0]);
    });
    __syncthreads();
    write_band(dx, to, dx_tile);
}
