// The geometry of pooling: which inputs a window covers, which windows cover an input.
#pragma once
#include "vector.h"

// N channels of a plane, wherever it is.
template <typename T, int N>
struct Plane {
    const T* first;
    int width;
    long long n_channels;

    __device__ Vector<T, N> operator()(int row, int column) const {
        return load<N>(first + ((long long)row * width + column) * n_channels);
    }
};

// The nearest values of a type.
template <typename T, int N>
__device__ inline Vector<T, N> narrowed(const Wide<T> (&values)[N]) {
    Vector<T, N> result;
#pragma unroll
    for (int k = 0; k < N; k++) result.values[k] = narrow<T>(values[k]);
    return result;
}

// One dimension: sizes, and the window's; an adaptive pooling uses the sizes alone.
struct Axis {
    int in, out, kernel, stride, padding, dilation;
};

struct Pool {
    Axis h, w;
    int columns;  // of a window, to number its taps: row * columns + column
};

// Inputs first, first + step, … before end; the first of them is the window's tap number tap.
struct Span {
    int first, end, step, tap;
};

// What of the input a window covers.
template <bool ADAPTIVE>
__device__ inline Span window_of(const Axis& axis, int out) {
    if (ADAPTIVE) {
        int first = int((long long)out * axis.in / axis.out);
        int end = int(((out + 1ll) * axis.in + axis.out - 1) / axis.out);
        return {first, end, 1, 0};
    }
    int start = out * axis.stride - axis.padding;
    int tap = start < 0 ? (axis.dilation - 1 - start) / axis.dilation : 0;
    int end = min(start + (axis.kernel - 1) * axis.dilation + 1, axis.in);
    return {start + tap * axis.dilation, end, axis.dilation, tap};
}

// The windows that may cover an input, from first to end - 1.
template <bool ADAPTIVE>
__device__ inline Span windows_over(const Axis& axis, int in) {
    if (ADAPTIVE) {
        int first = int((long long)in * axis.out / axis.in);
        int end = int(((in + 1ll) * axis.out + axis.in - 1) / axis.in);
        return {first, end, 1, 0};
    }
    int last_tap = in + axis.padding, first_tap = last_tap - (axis.kernel - 1) * axis.dilation;
    int first = first_tap <= 0 ? 0 : (first_tap - 1) / axis.stride + 1;
    return {first, min(last_tap / axis.stride + 1, axis.out), 1, 0};
}

// Which tap of a window an input is; -1 where a dilated window passes over it.
template <bool ADAPTIVE>
__device__ inline int tap_of(const Axis& axis, int out, int in) {
    if (ADAPTIVE) return in - int((long long)out * axis.in / axis.out);
    int offset = in + axis.padding - out * axis.stride;
    if (axis.dilation == 1) return offset;  // without the divisions
    return offset % axis.dilation ? -1 : offset / axis.dilation;
}

// What a window's sum is divided by. The window is clipped to the padded input in any case.
template <bool ADAPTIVE>
__device__ inline int length_of(const Axis& axis, int out, bool with_padding) {
    if (ADAPTIVE || !with_padding) {
        Span span = window_of<ADAPTIVE>(axis, out);
        return span.end - span.first;
    }
    int start = out * axis.stride - axis.padding;
    return min(start + axis.kernel, axis.in + axis.padding) - start;
}

// One more input of a window, its tap-th.
template <int N, typename T>
__device__ inline void take(const Vector<T, N>& found, int tap, Wide<T> (&best)[N],
                            int (&where)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        Wide<T> value = widen(found.values[k]);
        bool takes = value > best[k] || value != value;
        best[k] = takes ? value : best[k];
        where[k] = takes ? tap : where[k];
    }
}

__device__ inline bool is_in(const Axis& axis, int place) { return place >= 0 && place < axis.in; }

// The maximum of a window and its tap, for N channels at once. As PyTorch's: a NaN replaces what
// was before it, and -inf is kept by its first tap. Windows are SIZE by SIZE and STEP apart, which
// is known when they are compiled, unless it is 0.
template <bool ADAPTIVE, int SIZE, int STEP, int N, typename T>
__device__ inline void max_of_window(const Pool& pool, int oh, int ow, const Plane<T, N>& x,
                                     Wide<T> (&best)[N], int (&where)[N]) {
    for (int k = 0; k < N; k++) best[k] = __uint_as_float(0xff800000u);
    if constexpr (SIZE > 0) {
        int top = oh * STEP - pool.h.padding, left = ow * STEP - pool.w.padding;
        for (int k = 0; k < N; k++) where[k] = max(-top, 0) * SIZE + max(-left, 0);
#pragma unroll
        for (int row = 0; row < SIZE; row++) {
#pragma unroll
            for (int column = 0; column < SIZE; column++) {
                if (!is_in(pool.h, top + row) || !is_in(pool.w, left + column)) continue;
                take(x(top + row, left + column), row * SIZE + column, best, where);
            }
        }
        return;
    }
    Span h = window_of<ADAPTIVE>(pool.h, oh), w = window_of<ADAPTIVE>(pool.w, ow);
    for (int k = 0; k < N; k++) where[k] = h.tap * pool.columns + w.tap;
    for (int ih = h.first, row = h.tap; ih < h.end; ih += h.step, row++) {
        for (int iw = w.first, tap = row * pool.columns + w.tap; iw < w.end; iw += w.step, tap++) {
            take(x(ih, iw), tap, best, where);
        }
    }
}

// The place in its plane of a window's tap.
template <bool ADAPTIVE>
__device__ inline long long index_of(const Pool& pool, int oh, int ow, int tap) {
    int row = tap / pool.columns, column = tap % pool.columns;
    Span h = window_of<ADAPTIVE>(pool.h, oh), w = window_of<ADAPTIVE>(pool.w, ow);
    int ih = h.first + (row - h.tap) * h.step, iw = w.first + (column - w.tap) * w.step;
    return (long long)ih * pool.w.in + iw;
}

// Adds to sum the gradients of the maxima that are input (ih, iw), by ascending windows.
template <bool ADAPTIVE, int N, typename T, typename P>
__device__ inline void max_gradient(const Pool& pool, int ih, int iw, const Plane<T, N>& dy,
                                    const Plane<P, N>& positions, Wide<T> (&sum)[N]) {
    Span h = windows_over<ADAPTIVE>(pool.h, ih), w = windows_over<ADAPTIVE>(pool.w, iw);
    for (int oh = h.first; oh < h.end; oh++) {
        int row = tap_of<ADAPTIVE>(pool.h, oh, ih);
        for (int ow = w.first; ow < w.end && row >= 0; ow++) {
            int column = tap_of<ADAPTIVE>(pool.w, ow, iw);
            if (column < 0) continue;
            Vector<T, N> gradient = dy(oh, ow);
            Vector<P, N> taps = positions(oh, ow);
#pragma unroll
            for (int k = 0; k < N; k++) {
                bool is_it = taps.values[k] == row * pool.columns + column;
                sum[k] += is_it ? widen(gradient.values[k]) : Wide<T>(0);
            }
        }
    }
}

// Inputs by patches of STEP by STEP, of which all have the same windows: STEP rows from
// row * STEP - padding on, and so many columns. The windows' SIZE and STEP are known when they are
// compiled, which leaves no loop and no division.
struct Patches {
    int first_row, rows, first_column, columns;
};

template <int STEP>
__device__ inline Patches patches_of(const Pool& pool, int row, int rows) {
    int top = (row + pool.h.padding) / STEP, left = pool.w.padding / STEP;
    return {top, (row + rows - 1 + pool.h.padding) / STEP + 1 - top, left,
            (pool.w.in - 1 + pool.w.padding) / STEP + 1 - left};
}

// Adds to sum the gradients of the maxima that are the inputs of a patch, by ascending windows.
template <int SIZE, int STEP, int N, typename T, typename P>
__device__ inline void max_gradient_of_patch(const Pool& pool, int row, int column,
                                             const Plane<T, N>& dy, const Plane<P, N>& positions,
                                             Wide<T> (&sum)[STEP][STEP][N]) {
    constexpr int MOST = (SIZE - 1) / STEP;  // windows that begin in earlier patches
#pragma unroll
    for (int up = MOST; up >= 0; up--) {
#pragma unroll
        for (int left = MOST; left >= 0; left--) {
            int oh = row - up, ow = column - left;
            if (oh < 0 || oh >= pool.h.out || ow < 0 || ow >= pool.w.out) continue;
            Vector<T, N> gradient = dy(oh, ow);
            Vector<P, N> taps = positions(oh, ow);
#pragma unroll
            for (int place = 0; place < STEP * STEP; place++) {
                int h = up * STEP + place / STEP, w = left * STEP + place % STEP;
                if (h >= SIZE || w >= SIZE) continue;
#pragma unroll
                for (int k = 0; k < N; k++) {
                    bool is_it = taps.values[k] == h * SIZE + w;
                    sum[place / STEP][place % STEP][k] +=
                        is_it ? widen(gradient.values[k]) : Wide<T>(0);
                }
            }
        }
    }
}

// How averages are divided: by divisor, unless it is 0.
struct Average {
    long long with_padding, divisor;
};

// What a window's sum is divided by: the lengths one after the other, or what is in height alone.
template <typename W>
struct Area {
    W height, width;
};

template <bool ADAPTIVE, typename W>
__device__ inline Area<W> area_of(const Pool& pool, const Average& average, int oh, int ow) {
    int height = length_of<ADAPTIVE>(pool.h, oh, average.with_padding);
    int width = length_of<ADAPTIVE>(pool.w, ow, average.with_padding);
    if (ADAPTIVE) return {W(height), W(width)};
    return {average.divisor ? W(average.divisor) : W(height * width), W(1)};
}

template <bool ADAPTIVE, typename W>
__device__ inline W divided(W sum, const Area<W>& area) {
    return ADAPTIVE ? sum / area.height / area.width : sum / area.height;
}

template <bool ADAPTIVE, int N, typename T>
__device__ inline void average_of_window(const Pool& pool, const Average& average, int oh, int ow,
                                         const Plane<T, N>& x, Wide<T> (&sum)[N]) {
    Span h = window_of<ADAPTIVE>(pool.h, oh), w = window_of<ADAPTIVE>(pool.w, ow);
    for (int ih = h.first; ih < h.end; ih++) {
        for (int iw = w.first; iw < w.end; iw++) {
            Vector<T, N> found = x(ih, iw);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += widen(found.values[k]);
        }
    }
    if (h.first >= h.end || w.first >= w.end) return;
    Area<Wide<T>> area = area_of<ADAPTIVE, Wide<T>>(pool, average, oh, ow);
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] = divided<ADAPTIVE>(sum[k], area);
}

// Adds to sum what input (ih, iw) gets of the gradients of its windows, by ascending windows.
template <bool ADAPTIVE, int N, typename T>
__device__ inline void average_gradient(const Pool& pool, const Average& average, int ih, int iw,
                                        const Plane<T, N>& dy, Wide<T> (&sum)[N]) {
    Span h = windows_over<ADAPTIVE>(pool.h, ih), w = windows_over<ADAPTIVE>(pool.w, iw);
    for (int oh = h.first; oh < h.end; oh++) {
        for (int ow = w.first; ow < w.end; ow++) {
            Vector<T, N> gradient = dy(oh, ow);
            Area<Wide<T>> area = area_of<ADAPTIVE, Wide<T>>(pool, average, oh, ow);
#pragma unroll
            for (int k = 0; k < N; k++) {
                sum[k] += divided<ADAPTIVE>(Wide<T>(widen(gradient.values[k])), area);
            }
        }
    }
}
