//! The header that every kernel includes, as `build.rs` writes it from `tiles.rs` and `args.rs`: so
//! a kernel and what starts it cannot come to disagree about a number or a layout.
//!
//! Part of the build script alone. The macros below stand in for those of `mod.rs`: there the same
//! lines become constants and structs of the program, here they also tell what they are in C++.

macro_rules! tiles {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $value:expr;)*) => {
        /// All of them in C++.
        pub fn declared() -> String {
            [$(<$kind as crate::header::Tile>::declared(&$value, stringify!($name))),*].concat()
        }
    };
}

macro_rules! arguments {
    ($($(#[$doc:meta])* struct $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    })*) => {
        $(
            // What counts here is its size.
            #[allow(dead_code)]
            #[repr(C)]
            struct $name { $($field: $kind),* }

            impl crate::header::Field for $name {
                fn declared(name: &str) -> String {
                    format!("{}<T> {name}", stringify!($name))
                }
            }
        )*

        /// All of them in C++, each with a check of its size.
        pub fn declared() -> String {
            let struct_of = |name: &str, size: usize, fields: &[String]| {
                let fields: String = fields.iter().map(|f| format!("    {f};\n")).collect();
                format!(
                    "template <typename T> struct {name} {{\n{fields}}};\n\
                     static_assert(sizeof({name}<float>) == {size}, \"{name}\");\n\n"
                )
            };
            [$(struct_of(
                stringify!($name),
                size_of::<$name>(),
                &[$(<$kind as crate::header::Field>::declared(stringify!($field))),*],
            )),*]
            .concat()
        }
    };
}

/// A constant.
pub trait Tile {
    /// It in C++.
    fn declared(&self, name: &str) -> String;
}

impl Tile for u32 {
    fn declared(&self, name: &str) -> String {
        format!("constexpr int {name} = {self};\n")
    }
}

impl<const N: usize, const M: usize> Tile for [[u32; N]; M] {
    fn declared(&self, name: &str) -> String {
        let entry = |numbers: &[u32; N]| {
            format!(" EACH(__VA_ARGS__, {})", numbers.map(|n| n.to_string()).join(", "))
        };
        let entries: String = self.iter().map(entry).collect();
        format!("#define {name}(EACH, ...){entries}\n")
    }
}

/// The type of a struct's field.
pub trait Field {
    /// A field of it in C++.
    fn declared(name: &str) -> String;
}

/// A type that has a name in C++.
macro_rules! named {
    ($($kind:ty: $name:literal,)*) => {
        $(impl Field for $kind {
            fn declared(name: &str) -> String {
                format!("{} {name}", $name)
            }
        })*
    };
}

named! {
    u8: "unsigned char",
    u32: "u32",
    u64: "u64",
    f32: "float",
    f64: "double",
    Bf16: "bf16",
    E4m3: "e4m3",
    Element: "T",
}

impl<F: Field, const N: usize> Field for [F; N] {
    fn declared(name: &str) -> String {
        F::declared(&format!("{name}[{N}]"))
    }
}

/// As in `call.rs`.
pub enum Bf16 {}

/// As in `call.rs`.
pub enum E4m3 {}

/// As in `call.rs`.
pub enum Element {}

/// As in `call.rs`.
#[allow(dead_code)]
#[repr(transparent)]
pub struct Read<E>(u64, std::marker::PhantomData<E>);

/// As in `call.rs`.
#[allow(dead_code)]
#[repr(transparent)]
pub struct Write<E>(u64, std::marker::PhantomData<E>);

impl<E: Field> Field for Read<E> {
    fn declared(name: &str) -> String {
        format!("const {}", E::declared(&format!("*{name}")))
    }
}

impl<E: Field> Field for Write<E> {
    fn declared(name: &str) -> String {
        E::declared(&format!("*{name}"))
    }
}
