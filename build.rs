//! Compiles the CUDA kernels of `src/ops/cuda` where the feature `cuda` is on, by the `nvcc` that
//! candle's own build finds too: to machine code for `CUDA_COMPUTE_CAP`, with PTX for newer GPUs.

use std::{env, fs, path::PathBuf, process::Command};

#[macro_use]
#[path = "src/ops/cuda/header.rs"]
mod header;
#[path = "src/ops/cuda/args.rs"]
mod args;
#[path = "src/ops/cuda/tiles.rs"]
mod tiles;

// What `args` is written in.
use header::{Bf16, E4m3, Element, Read, Write};

const FOLDER: &str = "src/ops/cuda";
const KERNELS: [&str; 9] =
    ["attention", "choose", "decode", "elements", "optimizer", "products", "rows", "step", "sums"];

fn main() {
    println!("cargo::rerun-if-changed={FOLDER}");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let capability = env::var("CUDA_COMPUTE_CAP").ok().or_else(capability_here);
    let capability = capability.unwrap_or_else(|| "80".into());
    // Which of them may start before the one ahead has ended: those know to wait for it.
    println!("cargo::rustc-env=FLOPAUDIT_CUDA_CAPABILITY={capability}");
    let shared = ["#pragma once\n\n", &tiles::declared(), "\n", &args::declared()].concat();
    fs::write(format!("{out}/shared.cuh"), shared).expect("cargo's OUT_DIR can be written to");
    // With the instructions that Hopper alone has.
    let architecture = if capability == "90" { "90a" } else { &capability };
    for name in KERNELS {
        let source = format!("{FOLDER}/{name}.cu");
        let status = Command::new(nvcc())
            .args(["--fatbin", "-std=c++17", "-O3", &format!("-I{out}")])
            .arg(format!("-gencode=arch=compute_{0},code=[sm_{0},compute_{0}]", architecture))
            .args(["-o", &format!("{out}/{name}.fatbin"), &source])
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{source}: nvcc ended with {status}"),
            Err(e) => panic!("nvcc does not run ({e}); scripts/build-cuda.sh builds without one"),
        }
    }
}

/// That of this machine's first GPU, as candle's own build asks for it: 9.0 is 90.
fn capability_here() -> Option<String> {
    let asked = ["--query-gpu=compute_cap", "--format=csv,noheader"];
    let out = Command::new("nvidia-smi").args(asked).output().ok()?;
    let capability = String::from_utf8(out.stdout).ok()?.lines().next()?.trim().replace('.', "");
    (!capability.is_empty() && capability.bytes().all(|b| b.is_ascii_digit())).then_some(capability)
}

/// `NVCC`, else that of `CUDA_HOME` or `CUDA_PATH`, else whichever is in the path.
fn nvcc() -> PathBuf {
    let in_toolkit = |variable| {
        let nvcc = PathBuf::from(env::var_os(variable)?).join("bin/nvcc");
        nvcc.is_file().then_some(nvcc)
    };
    let named = env::var_os("NVCC").map(PathBuf::from);
    named
        .or_else(|| in_toolkit("CUDA_HOME"))
        .or_else(|| in_toolkit("CUDA_PATH"))
        .unwrap_or_else(|| "nvcc".into())
}
