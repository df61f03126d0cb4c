#include "cuda/plan.h"

#include <algorithm>
#include <numeric>

namespace bnfast::cuda {
namespace {

// ---- the one table of choices ---------------------------------------------------------------------------------------
// No number of it has been measured on a device yet.

// Of the grid: they change bits.
constexpr Index wanted_items = 2048;  // some 4 per block of 132 SMs with 4 blocks each: the last ones cost little
constexpr Index least_per_thread = 8, most_values_per_thread = 64;  // vectors; values per channel
constexpr Index most_tile_waste = 16;                               // idle columns: at most 1/16
constexpr Index many_parts = 512;                                   // from here on a whole block merges one channel

// Of the schedule: they change none.
constexpr Index blocks_per_sm = 8;             // 2048 threads
constexpr Index small_tensor_bytes = 1 << 20;  // one launch wins, however few channels there are
constexpr int most_cluster_blocks = 8;         // what every device with clusters can launch
constexpr Index least_kept = 4;                // resident: 1/4 of what is read twice else; it halves the blocks per SM

constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
constexpr Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

Index item_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
Index compute_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }
Index values_per_vector(DType dtype) { return 16 / item_bytes(dtype); }

// Rows per packed row: the fewest that fill whole vectors and leave few columns of the last tile idle, as long as every
// thread still has its rows.
Index pack_of(Index N, Index C, Index V) {
    const Index base = V / std::gcd(C, V), vectors = base * C / V;
    Index best = 1, best_waste = tile_vectors;
    for (Index m = 1; m <= tile_vectors && (m == 1 || N / (m * base) >= tile_lanes * least_per_thread); ++m) {
        const Index used = m * vectors, room = round_up(used, tile_vectors);
        const Index waste = (room - used) * tile_vectors / room;  // in 1/32
        if (waste < best_waste) {
            best = m;
            best_waste = waste;
        }
        if ((room - used) * most_tile_waste <= room) break;
    }
    return best * base;
}

void make_columns(Grid& g, Index V) {
    g.columns = 1;
    g.pack = pack_of(g.N, g.C, V);
    g.row_size = g.pack * g.C;
    g.rows = g.N / g.pack;
    g.tail = g.N % g.pack;
    g.row_vectors = g.row_size / V;
    g.tiles = ceil_div(g.row_vectors, tile_vectors);
    const Index wanted = ceil_div(g.rows * g.tiles, wanted_items * tile_lanes);
    const Index per_thread = std::clamp(round_up(wanted, least_per_thread), least_per_thread, most_values_per_thread);
    g.chunk_rows = per_thread * tile_lanes;
    g.chunk_width = g.row_size;
    g.pieces = 1;
    g.chunks = std::max<Index>(1, ceil_div(g.rows, g.chunk_rows));
}

// Vectors that `width` values may touch: if rows begin anywhere, one more than they fill.
Index vectors_touched(Index width, Index S, Index V) {
    return S % V == 0 ? ceil_div(width, V) : ceil_div(width + V - 1, V);
}

void make_rows(Grid& g, Index V) {
    g.pack = 1;
    g.row_size = g.S;
    g.rows = g.N;
    g.tiles = g.C;
    const Index row = vectors_touched(g.S, g.S, V), most = most_values_per_thread / V;
    const Index wanted = ceil_div(g.N * g.C * row, wanted_items * block_threads);
    const Index chunk = block_threads * std::clamp(wanted, std::min(least_per_thread, most), most);  // in vectors
    if (row <= chunk) {
        g.pieces = 1;
        g.chunk_width = g.S;
        g.chunk_rows = ceil_div(g.N, ceil_div(g.N, chunk / row));
        g.chunks = ceil_div(g.N, g.chunk_rows);
    } else {
        g.chunk_rows = 1;
        g.chunk_width = round_up(ceil_div(g.S, ceil_div(g.S, chunk * V)), V);
        g.pieces = ceil_div(g.S, g.chunk_width);
        g.chunks = g.N * g.pieces;
    }
    g.row_vectors = vectors_touched(g.chunk_width, g.S, V);
    g.row_step = int(block_threads / g.row_vectors);
    g.vector_step = int(block_threads % g.row_vectors);
}

unsigned blocks_for(Index work, const DeviceLimits& device) {
    return unsigned(std::min(work, device.sms * blocks_per_sm));
}

ScratchLayout scratch_of(const Grid& g, DType dtype) {
    ScratchLayout s;
    s.part_bytes = round_up(g.chunks * g.pack * g.C * compute_bytes(dtype), 256);
    s.constant_bytes = round_up(g.C * compute_bytes(dtype), 256);
    s.constants_at = 3 * s.part_bytes;
    s.arrived_at = s.constants_at + 5 * s.constant_bytes;
    s.bytes = s.arrived_at + 256;
    return s;
}

bool trains(Call call) { return call == Call::train || call == Call::gradient; }

bool plan_channel(Plan& p, const PlanRequest& r, const DeviceLimits& device) {
    const Grid& g = p.grid;
    if (g.columns || g.chunks == 0 || !trains(r.call)) return false;
    const bool gradient = r.call == Call::gradient;
    auto shared = [&] { return channel_shared_bytes(g, r.dtype, gradient, p.cluster); };
    while (shared() > device.shared_per_block && device.clusters && p.cluster < most_cluster_blocks) p.cluster *= 2;
    const Index bytes = g.N * g.C * g.S * item_bytes(r.dtype), blocks = p.cluster * g.C;
    const bool wins = 2 * blocks >= device.sms || bytes <= small_tensor_bytes;
    if (shared() > device.shared_per_block || !(r.form == Form::channel || wins)) {
        p.cluster = 1;
        return false;
    }
    p.form = Form::channel;
    const Index clusters = std::max<Index>(1, std::min(g.C, device.sms * blocks_per_sm / p.cluster));
    p.reduce_blocks = unsigned(clusters * p.cluster);
    p.reduce_shared = shared();
    if (p.cluster > 1) p.scratch = scratch_of(g, r.dtype);
    p.bytes_read = r.inputs * r.shape.size() * item_bytes(r.dtype);
    return true;
}

bool plan_resident(Plan& p, const PlanRequest& r, const DeviceLimits& device) {
    const Grid& g = p.grid;
    if (g.chunks == 0 || !trains(r.call) || !device.cooperative) return false;
    const bool gradient = r.call == Call::gradient;
    const Index items = g.chunks * g.tiles, X = r.shape.size() * item_bytes(r.dtype), reduced = gradient ? 2 * X : X;
    const Index blocks = std::min<Index>(items, device.sms * resident_blocks_per_sm),
                limit = resident_shared_limit(device);
    const Index front = resident_shared_bytes(r.dtype, gradient, 0), slot = 16 * block_threads * (gradient ? 2 : 1);
    if (front > limit) return false;
    const Index slots_per_item =
        g.columns ? g.chunk_rows / tile_lanes : ceil_div(g.chunk_rows * g.row_vectors, block_threads);
    const Index slots = std::min(ceil_div(items, blocks) * slots_per_item, (limit - front) / slot);
    const Index kept = std::min(reduced, blocks * slots * slot);
    if (r.form != Form::resident && least_kept * kept < reduced) return false;
    p.form = Form::resident;
    p.kept_slots = int(slots);
    p.reduce_blocks = unsigned(blocks);
    p.reduce_shared = resident_shared_bytes(r.dtype, gradient, p.kept_slots);
    p.scratch = scratch_of(g, r.dtype);
    p.bytes_read = reduced + r.inputs * X - kept;
    return true;
}

void plan_sweeps(Plan& p, const PlanRequest& r, const DeviceLimits& device) {
    const Grid& g = p.grid;
    const Index items = g.chunks * g.tiles;
    p.form = Form::sweeps;
    p.finalize_shared = r.call == Call::infer ? 0 : 8 * (4 + 2) * 8;
    const Index channels_per_block = r.call == Call::infer ? block_threads : block_threads / g.merge_lanes;
    p.finalize_blocks = blocks_for(ceil_div(g.C, channels_per_block), device);
    if (r.call != Call::infer) {
        p.reduce_blocks = blocks_for(items, device);
        p.reduce_shared =
            r.call == Call::gradient ? gradient_shared_bytes(g, r.dtype) : moments_shared_bytes(g, r.dtype);
    }
    if (r.call != Call::moments) p.apply_blocks = blocks_for(items, device);
    p.scratch = scratch_of(g, r.dtype);
}

}  // namespace

Grid make_grid(Shape shape, DType dtype) {
    const Index V = values_per_vector(dtype);
    Grid g{};
    if (shape.C == 1) shape = Shape{1, 1, shape.N * shape.S};  // one long row
    g.N = shape.N;
    g.C = shape.C;
    g.S = shape.S;
    g.merge_lanes = 32;
    g.pack = g.pieces = 1;
    if (shape.size() == 0) return g;
    if (shape.S == 1) make_columns(g, V);
    else make_rows(g, V);
    if (g.chunks * g.pack > many_parts) g.merge_lanes = block_threads;
    return g;
}

Index moments_shared_bytes(const Grid& g, DType dtype) {
    const Index columns = tile_vectors * values_per_vector(dtype);
    return compute_bytes(dtype) * (g.columns ? columns * (2 * tile_lanes + 1) : 3 * block_threads / 32);
}

Index gradient_shared_bytes(const Grid& g, DType dtype) {
    const Index columns = tile_vectors * values_per_vector(dtype);
    return compute_bytes(dtype) * (g.columns ? columns * 2 * tile_lanes : 2 * block_threads / 32);
}

Index channel_shared_bytes(const Grid& g, DType dtype, bool gradient, int cluster) {
    const Index T = compute_bytes(dtype), warps = block_threads / 32;
    const Index front = round_up(warps * (4 + 2) * 8 + T * (3 * warps + 2 * warps + 5), 16);
    const Index parts = cluster > 1 ? 0 : round_up(3 * g.chunks * g.pack * T, 16);
    return front + parts + 16 * ceil_div(g.chunks, cluster) * g.chunk_rows * g.row_vectors * (gradient ? 2 : 1);
}

Index resident_shared_limit(const DeviceLimits& device) {
    const Index each = device.shared_per_sm / resident_blocks_per_sm - device.reserved_per_block;
    return std::min(device.shared_per_block, each) / 16 * 16;
}

Index resident_shared_bytes(DType dtype, bool gradient, int slots) {
    const Index columns = tile_vectors * values_per_vector(dtype);  // the moments' sums of one tile are the largest
    const Index front = round_up(compute_bytes(dtype) * columns * (2 * tile_lanes + 1), 16);
    return front + Index(16 * block_threads) * slots * (gradient ? 2 : 1);
}

Parts ScratchLayout::parts(void* scratch) const {
    auto at = [&](Index i) { return static_cast<char*>(scratch) + i * part_bytes; };
    return {at(0), at(1), at(2)};
}
unsigned* ScratchLayout::arrived(void* scratch) const {
    return reinterpret_cast<unsigned*>(static_cast<char*>(scratch) + arrived_at);
}
Constants ScratchLayout::constants(void* scratch) const {
    auto at = [&](Index i) { return static_cast<char*>(scratch) + constants_at + i * constant_bytes; };
    return {at(0), at(1), at(2), at(3), at(4)};
}

Plan make_plan(const PlanRequest& r, const DeviceLimits& device) {
    Plan p;
    p.grid = make_grid(r.shape, r.dtype);
    const Index X = r.shape.size() * item_bytes(r.dtype), reduced = r.call == Call::gradient ? 2 : 1;
    const bool applies = r.call != Call::moments;
    p.bytes_written = applies ? r.outputs * X : 0;
    const bool any = r.form == Form::automatic;
    if ((any || r.form == Form::channel) && plan_channel(p, r, device)) return p;
    if ((any || r.form == Form::resident) && plan_resident(p, r, device)) return p;
    plan_sweeps(p, r, device);
    p.bytes_read = (r.call == Call::infer ? 0 : reduced * X) + (applies ? r.inputs * X : 0);
    return p;
}

}  // namespace bnfast::cuda
