// The other way round from pooling: values go back to where the maxima were.
//
// Tensors are (batch, places, channels) in memory: channels_last, or with planes as the batch and
// one channel. Where two values go to one place, the last of the plane stays, whoever comes first.
#include "vector.h"

// Where element i of a (batch, n_from, channels) tensor goes in a (batch, n_to, channels) one.
__device__ inline long long moved(long long i, long long index, long long n_from, long long n_to,
                                  long long n_channels) {
    long long place = quotient(i, n_channels), batch = quotient(place, n_from);
    return (batch * n_to + index) * n_channels + i - place * n_channels;
}

// winners = for each output the last input that goes there; it must hold -1 before.
template <int N>
__global__ void max_unpool_winners_kernel(const long long* indices, int* winners,
                                          long long n_vectors, long long n_inputs,
                                          long long n_outputs, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Vector<long long, N> index = load<N>(indices + i * N);
    for (int k = 0; k < N; k++) {
        assert(index.values[k] >= 0 && index.values[k] < n_outputs);
        long long input = quotient(i * N + k, n_channels);
        long long to = moved(i * N + k, index.values[k], n_inputs, n_outputs, n_channels);
        atomicMax(winners + to, int(input - quotient(input, n_inputs) * n_inputs));
    }
}

// y = the input that has won the place, or 0.
template <typename T, int N>
__global__ void max_unpool_forward_kernel(const T* x, const int* winners, T* y, long long n_vectors,
                                          long long n_inputs, long long n_outputs,
                                          long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Vector<int, N> winner = load<N>(winners + i * N);
    Vector<T, N> result;
#pragma unroll
    for (int k = 0; k < N; k++) {
        long long from = moved(i * N + k, winner.values[k], n_outputs, n_inputs, n_channels);
        result.values[k] = winner.values[k] < 0 ? narrow<T>(0) : x[from];
    }
    store(y + i * N, result);
}

// dx = dy where the input went.
template <typename T, int N>
__global__ void max_unpool_backward_kernel(const T* dy, const long long* indices, T* dx,
                                           long long n_vectors, long long n_inputs,
                                           long long n_outputs, long long n_channels) {
    long long i = this_thread();
    if (i >= n_vectors) return;
    Vector<long long, N> index = load<N>(indices + i * N);
    Vector<T, N> result;
#pragma unroll
    for (int k = 0; k < N; k++) {
        assert(index.values[k] >= 0 && index.values[k] < n_outputs);
        result.values[k] = dy[moved(i * N + k, index.values[k], n_inputs, n_outputs, n_channels)];
    }
    store(dx + i * N, result);
}
