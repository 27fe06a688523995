//! How work is cut: numbers that a kernel and what starts it must agree on. They stand here alone;
//! `build.rs` writes them into the header that every kernel includes, lists as macros that repeat
//! their argument for each entry.

tiles! {
    /// Threads of a block that goes element by element.
    ELEMENT_THREADS: u32 = 256;
    /// Elements that a thread takes at once, one or as many as 16 bytes of bf16.
    PACKS: [[u32; 1]; 2] = [[1], [8]];

    /// (elements of a pack, packs a thread, threads a row), by the most elements that they hold.
    ROW_SHAPES: [[u32; 3]; 9] = [
        [1, 8, 32],
        [1, 8, 256],
        [8, 1, 32],
        [8, 2, 32],
        [8, 4, 32],
        [8, 1, 256],
        [8, 2, 256],
        [8, 4, 256],
        [8, 4, 1024],
    ];
    /// Threads of a block whose rows have one warp each.
    WARP_ROWS_THREADS: u32 = 128;
    /// Threads that a row of logits has for its cross-entropy.
    CROSS_ENTROPY_THREADS: u32 = 1024;

    /// Warps of a block that attends over whole sequences.
    ATTENTION_WARPS: u32 = 4;
    /// (head width, tiles of 16 query rows a warp, keys of a tile)
    ATTENTION_SHAPES: [[u32; 3]; 2] = [[64, 2, 64], [128, 1, 32]];
    /// Queries and keys of a block that blocked attention computes or leaves out.
    ATTENTION_BLOCK: u32 = 64;
    /// Warps of a block that computes it, each with 16 queries.
    ATTENTION_BLOCKED_WARPS: u32 = 8;
    /// (head width, warpgroups of a block, each with 64 queries), where a GPU has their products.
    ATTENTION_WIDE_SHAPES: [[u32; 2]; 2] = [[64, 2], [128, 3]];
    /// (head width, query rows of a tile) of its gradients.
    ATTENTION_GRAD_SHAPES: [[u32; 2]; 2] = [[64, 64], [128, 32]];

    /// Threads of a block that attends with one token.
    LOOKERS: u32 = 256;
    /// (head width, query heads of one block at most): one, or what shared memory has room for.
    ATTEND_SHAPES: [[u32; 2]; 12] = [
        [8, 1],
        [8, 8],
        [16, 1],
        [16, 8],
        [32, 1],
        [32, 8],
        [64, 1],
        [64, 8],
        [128, 1],
        [128, 8],
        [256, 1],
        [256, 4],
    ];
    /// Threads of a block that attends with one token by the tensor cores.
    TILE_LOOKERS: u32 = 128;
    /// Bytes of keys and values that such a block has under way.
    ATTEND_TILE_BYTES: u32 = 65_536;
    /// Head widths of such.
    ATTEND_TILE_WIDTHS: [[u32; 1]; 2] = [[64], [128]];
    /// Shares that the keys of one head are split into at most.
    MOST_SPLITS: u32 = 32;

    /// Threads of a block of products.
    PROJECT_THREADS: u32 = 128;
    /// (rows of the input at most, rows of the weight a block, packs of each under way), of
    /// products that are written.
    PROJECT_SHAPES: [[u32; 3]; 4] = [[1, 4, 1], [2, 4, 1], [4, 4, 1], [8, 4, 1]];
    /// The same of products that are added to what is there.
    PROJECT_ADD_SHAPES: [[u32; 3]; 4] = [[1, 2, 5], [2, 2, 5], [4, 2, 5], [8, 2, 5]];
    /// The same of pairs, one of which goes through an activation.
    PROJECT_GATED_SHAPES: [[u32; 3]; 4] = [[1, 4, 1], [2, 4, 1], [4, 4, 1], [8, 2, 1]];
    /// Warps of a block of products by the tensor cores.
    TILE_WARPS: u32 = 8;
    /// Rows of the weight that it takes.
    TILE_ROWS: u32 = 16;
    /// Rows of the input in a tile.
    TILE_COLUMNS: u32 = 8;
    /// Tiles of the input that such a kernel takes at most.
    TILES: [[u32; 1]; 4] = [[1], [2], [4], [8]];

    /// Warps of a block of a whole step that multiply or attend; another one fetches.
    STEP_WARPS: u32 = 14;
    /// Tiles of 16 rows that such a block sums up together.
    STEP_TILES: u32 = 6;
    /// Bytes of shared memory that it has beside weights and what they are multiplied by.
    STEP_OWN: u32 = 4096;
    /// Query heads that a block attends with at most.
    STEP_HEADS: u32 = 8;
    /// The widest hidden state.
    STEP_HIDDEN: u32 = 2048;
    /// The most rows of it that one block has.
    STEP_ROWS: u32 = 256;
    /// Head widths of such a step.
    STEP_WIDTHS: [[u32; 1]; 2] = [[64], [128]];

    /// Threads of a block that looks for the largest logit.
    CHOOSERS: u32 = 256;
    /// Threads of a block that draws a token.
    DRAWERS: u32 = 1024;
    /// Blocks that draw a row's token together.
    PEERS: u32 = 8;

    /// Elements of a tensor whose squares a block sums.
    SQUARED: u32 = 16384;
    /// Elements of a parameter that a block updates.
    UPDATED: u32 = 2048;

    /// Threads of a block that sums the rows of one id.
    EMBED_GRAD_THREADS: u32 = 128;
    /// Threads of a block that sums rows.
    SUM_THREADS: u32 = 256;
    /// (elements of a pack, packs a thread, threads a row), by the most elements that they hold.
    SUM_SHAPES: [[u32; 3]; 10] = [
        [1, 8, 32],
        [1, 8, 256],
        [8, 1, 8],
        [8, 1, 16],
        [8, 1, 32],
        [8, 2, 32],
        [8, 4, 32],
        [8, 1, 256],
        [8, 2, 256],
        [8, 4, 256],
    ];
    /// Threads of a block that sums what other blocks have summed.
    SUM_PARTS_THREADS: u32 = 1024;
    /// Columns that it sums.
    SUM_COLUMNS: u32 = 32;
}
