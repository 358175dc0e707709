// Dropout: y = factor x + addend, where both depend on whether the element is kept: as its random
// bits say, or those of its channel, or a mask of one bit an element. Memory is read and written
// once, 16 bytes a thread; what is left at the end goes one by one. x and y may be the same.
#include "philox.h"

using Index = unsigned long long;  // of an element: tensors have more than 2^32

template <typename T>
struct Outcome {
    Wide<T> factor, addend;
};

// The outcome of random bits; ``threshold`` is that of philox.py, which is in signed numbers.
template <typename T>
struct Rule {
    Outcome<T> kept, dropped;
    unsigned threshold;

    __device__ Rule(long long threshold, double scale, double kept_addend, double dropped_addend)
        : kept{Wide<T>(scale), Wide<T>(kept_addend)},
          dropped{0, Wide<T>(dropped_addend)},
          threshold(unsigned(threshold) ^ 0x80000000u) {}

    __device__ Outcome<T> operator()(unsigned bits) const {
        return bits > threshold ? kept : dropped;
    }
};

template <int N, typename T>
__device__ Vector<T, N> applied(const Outcome<T> (&outcomes)[N], Vector<T, N> x) {
#pragma unroll
    for (int k = 0; k < N; k++)
        x.values[k] = narrow<T>(fma(widen(x.values[k]), outcomes[k].factor, outcomes[k].addend));
    return x;
}

// The bits of N elements from ``first`` on, which N, a power of two, divides.
template <int N>
__device__ void draw(unsigned (&bits)[N], unsigned long long seed, Index first) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
        uint4 words = philox(seed, (first + k) / 4);
#pragma unroll
        for (int j = 0; j < 4 && k + j < N; j++)
            bits[k + j] = word(words, N < 4 ? unsigned(first + j) % 4 : j);
    }
}

template <int N, typename T>
__device__ void drop_elements(const T* x, unsigned long long seed, T* y, Index first,
                              const Rule<T>& rule) {
    Vector<T, N> values = load<N>(x + first);
    unsigned bits[N];
    draw(bits, seed, first);
    Outcome<T> outcomes[N];
#pragma unroll
    for (int k = 0; k < N; k++) outcomes[k] = rule(bits[k]);
    store(y + first, applied(outcomes, values));
}

// Elements are drawn one by one, in the order of memory.
template <typename T, int VECTOR>
__global__ void dropout_kernel(const T* x, const long long* seed, T* y, long long n_elements,
                               long long threshold, double scale, double kept_addend,
                               double dropped_addend) {
    Rule<T> rule(threshold, scale, kept_addend, dropped_addend);
    Index first = this_thread() * VECTOR, n = n_elements;
    if (first + VECTOR <= n) {
        drop_elements<VECTOR>(x, *seed, y, first, rule);
    } else {
#pragma unroll 1
        for (Index i = first; i < n; i++) drop_elements<1>(x, *seed, y, i, rule);
    }
}

// The sizes of (rows, channels, inner), as the tensor lies in memory; or (rows, inner, channels).
struct Sizes {
    Divisor channels, inner;
};

// Channels are contiguous, and N elements lie in two of them at most, as N <= inner.
template <int N, typename T>
__device__ void choose_outer(Outcome<T> (&outcomes)[N], unsigned long long seed, Index first,
                             Sizes sizes, const Rule<T>& rule) {
    Index channel = quotient(first, sizes.inner), end = (channel + 1) * sizes.inner.divisor;
    int n_here = end - first < N ? int(end - first) : N;
    unsigned here[1], next[1] = {0};
    draw(here, seed, channel);
    if (n_here < N) draw(next, seed, channel + 1);
    Outcome<T> of_here = rule(here[0]), of_next = rule(next[0]);
#pragma unroll
    for (int k = 0; k < N; k++) outcomes[k] = k < n_here ? of_here : of_next;
}

// The number of the channel that an element is of, where channels vary fastest.
__device__ inline Index channel_of(Index element, const Sizes& sizes) {
    if (element >> 31 || !sizes.channels.multiplier || !sizes.inner.multiplier) {
        Index position = element / sizes.channels.divisor, row = position / sizes.inner.divisor;
        return element - (position - row) * sizes.channels.divisor;
    }
    unsigned position = quick_quotient(unsigned(element), sizes.channels);
    unsigned row = quick_quotient(position, sizes.inner);
    return unsigned(element) - (position - row) * unsigned(sizes.channels.divisor);
}

// Each of N neighbours is of another channel.
template <int N, typename T>
__device__ void choose_inner(Outcome<T> (&outcomes)[N], unsigned long long seed, Index first,
                             Sizes sizes, const Rule<T>& rule) {
    unsigned bits[N];
    draw(bits, seed, channel_of(first, sizes));
#pragma unroll
    for (int k = 0; k < N; k++) outcomes[k] = rule(bits[k]);
}

template <int N, bool CHANNELS_LAST, typename T>
__device__ void drop_channels(const T* x, unsigned long long seed, T* y, Index first,
                              Sizes sizes, const Rule<T>& rule) {
    Vector<T, N> values = load<N>(x + first);
    Outcome<T> outcomes[N];
    if (CHANNELS_LAST)
        choose_inner(outcomes, seed, first, sizes, rule);
    else
        choose_outer(outcomes, seed, first, sizes, rule);
    store(y + first, applied(outcomes, values));
}

// Whole channels are drawn: channel c of row r as element r n_channels + c. VECTOR divides
// n_channels where the channels are last, and is at most n_inner where they are not.
template <typename T, int VECTOR, bool CHANNELS_LAST>
__global__ void channel_dropout_kernel(const T* x, const long long* seed, T* y, Divisor n_channels,
                                       Divisor n_inner, long long n_elements, long long threshold,
                                       double scale, double kept_addend,
                                       double dropped_addend) {
    Rule<T> rule(threshold, scale, kept_addend, dropped_addend);
    Sizes sizes{n_channels, n_inner};
    Index first = this_thread() * VECTOR, n = n_elements;
    if (first + VECTOR <= n) {
        drop_channels<VECTOR, CHANNELS_LAST>(x, *seed, y, first, sizes, rule);
    } else if (!CHANNELS_LAST) {  // or nothing is left over
#pragma unroll 1
        for (Index i = first; i < n; i++) drop_channels<1, false>(x, *seed, y, i, sizes, rule);
    }
}

// N, a power of two up to eight, divides ``first``, so the bits lie in one byte.
template <int N, typename T>
__device__ void drop_masked(const T* x, const unsigned char* mask, T* y, Index first,
                            Outcome<T> kept) {
    Vector<T, N> values = load<N>(x + first);
    unsigned byte = mask[first / 8] >> (first % 8);
    Outcome<T> outcomes[N], dropped{0, kept.addend};
#pragma unroll
    for (int k = 0; k < N; k++) outcomes[k] = byte >> k & 1 ? kept : dropped;
    store(y + first, applied(outcomes, values));
}

// Elements are dropped where the mask has a 0.
template <typename T, int VECTOR>
__global__ void masked_dropout_kernel(const T* x, const unsigned char* mask, T* y,
                                      long long n_elements, double scale, double addend) {
    Outcome<T> kept{Wide<T>(scale), Wide<T>(addend)};
    Index first = this_thread() * VECTOR, n = n_elements;
    if (first + VECTOR <= n) {
        drop_masked<VECTOR>(x, mask, y, first, kept);
    } else {
#pragma unroll 1
        for (Index i = first; i < n; i++) drop_masked<1>(x, mask, y, i, kept);
    }
}

// The mask alone, a word of 32 elements a thread: element i is bit i % 8 of byte i / 8, and 1 if it
// is kept. The bits behind the last element are 0.
template <int N>
__global__ void dropout_mask_kernel(const long long* seed, unsigned char* mask,
                                    long long n_elements, long long threshold) {
    static_assert(N == 32, "a word has 32 bits");
    Rule<float> rule(threshold, 1, 0, 0);
    Index first = this_thread() * N, n = n_elements;
    if (first >= n) return;
    unsigned bits[N], kept = 0;
    draw(bits, *seed, first);
#pragma unroll
    for (int k = 0; k < N; k++) kept |= unsigned(bits[k] > rule.threshold) << k;
    if (first + N <= n) {
        *reinterpret_cast<unsigned*>(mask + first / 8) = kept;
    } else {
        kept &= (1u << (n - first)) - 1;
#pragma unroll 1
        for (Index i = first; i < n; i += 8) mask[i / 8] = kept >> (i - first);
    }
}
